//! Between what is typed or kept in files (JSON, TOML) and what goes over the wire.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::collections::BTreeMap;
use xmlrpc::Value;

/// The members that are there; an option that was not given is not sent.
pub fn options<const N: usize>(members: [(&str, Option<Value>); N]) -> Value {
    let given = members.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    Value::Struct(given.collect())
}

/// The smallest integer type that holds it, since the dialect's `int` has 32 bits.
pub fn int(number: i64) -> Value {
    match i32::try_from(number) {
        Ok(small) => Value::Int(small),
        Err(_) => Value::Int64(number),
    }
}

/// JSON if it can be read so, else text.
pub fn from_argument(text: &str) -> Result<Value, String> {
    match serde_json::from_str::<serde_json::Value>(text) {
        Ok(json) => from_json(json),
        Err(_) => Ok(Value::from(text)),
    }
}

pub fn from_json(json: serde_json::Value) -> Result<Value, String> {
    use serde_json::Value as Json;
    Ok(match json {
        Json::Null => Value::Nil,
        Json::Bool(yes) => Value::Bool(yes),
        Json::String(text) => Value::String(text),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(whole), _) => int(whole),
            (None, Some(real)) if !number.is_u64() => Value::Double(real),
            _ => return Err(format!("the number {number} has more than 64 bits")),
        },
        Json::Array(items) => Value::Array(items.into_iter().map(from_json).collect::<Result<_, _>>()?),
        Json::Object(members) => {
            let member = |(name, value)| Ok::<_, String>((name, from_json(value)?));
            Value::Struct(members.into_iter().map(member).collect::<Result<_, _>>()?)
        }
    })
}

pub fn from_toml(toml: toml::Value) -> Value {
    match toml {
        toml::Value::String(text) => Value::String(text),
        toml::Value::Integer(number) => int(number),
        toml::Value::Float(number) => Value::Double(number),
        toml::Value::Boolean(yes) => Value::Bool(yes),
        // The dialect tells times as text.
        toml::Value::Datetime(time) => Value::String(time.to_string()),
        toml::Value::Array(items) => Value::Array(items.into_iter().map(from_toml).collect()),
        toml::Value::Table(members) => {
            Value::Struct(members.into_iter().map(|(name, value)| (name, from_toml(value))).collect())
        }
    }
}

pub fn to_json(value: &Value) -> serde_json::Value {
    use serde_json::Value as Json;
    match value {
        Value::Nil => Json::Null,
        Value::Bool(yes) => Json::Bool(*yes),
        Value::Int(number) => Json::from(*number),
        Value::Int64(number) => Json::from(*number),
        // JSON has no form for infinity and NaN; null is what its readers expect.
        Value::Double(number) => Json::from(*number),
        Value::String(text) => Json::from(text.as_str()),
        Value::DateTime(time) => Json::from(time.to_string()),
        Value::Base64(bytes) => Json::from(STANDARD.encode(bytes)),
        Value::Array(items) => Json::Array(items.iter().map(to_json).collect()),
        Value::Struct(members) => {
            Json::Object(members.iter().map(|(name, value)| (name.clone(), to_json(value))).collect())
        }
    }
}

/// The text of a member, or "".
pub fn text<'v>(value: &'v Value, name: &str) -> &'v str {
    value.get(name).and_then(Value::as_str).unwrap_or("")
}

/// The whole number of a member.
pub fn number(value: &Value, name: &str) -> Option<i64> {
    whole(value.get(name)?)
}

pub fn whole(value: &Value) -> Option<i64> {
    match value {
        Value::Int(number) => Some(i64::from(*number)),
        Value::Int64(number) => Some(*number),
        _ => None,
    }
}

/// The members of a struct; those of anything else are none.
pub fn members(value: Value) -> BTreeMap<String, Value> {
    match value {
        Value::Struct(members) => members,
        _ => BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn struct_of<const N: usize>(members: [(&str, Value); N]) -> Value {
        Value::Struct(members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }

    #[test]
    fn an_argument_is_json_if_it_can_be_read_so_and_text_otherwise() {
        for (typed, value) in [
            ("5", Value::Int(5)),
            ("-5", Value::Int(-5)),
            ("4294967296", Value::Int64(4_294_967_296)),
            ("\"5\"", Value::from("5")),
            ("true", Value::Bool(true)),
            ("null", Value::Nil),
            ("1.5", Value::Double(1.5)),
            ("web-1", Value::from("web-1")),
            ("007", Value::from("007")),
            ("", Value::from("")),
            ("[1, \"a\"]", Value::Array(vec![Value::Int(1), Value::from("a")])),
            ("{\"a\": {}}", struct_of([("a", struct_of([]))])),
        ] {
            assert_eq!(from_argument(typed).unwrap(), value, "{typed}");
        }
        assert!(from_argument("18446744073709551615").is_err());
    }

    #[test]
    fn json_goes_to_a_value_and_back_unchanged() {
        let json = serde_json::json!({"a": [1, 2.5, null, true, "x"], "b": {"c": 4_294_967_296_i64}});
        assert_eq!(to_json(&from_json(json.clone()).unwrap()), json);
    }
}
