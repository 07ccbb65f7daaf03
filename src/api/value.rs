//! Making values for the wire.

use crate::host::support::redact;
use crate::wire::Value;

/// Numbers on the wire are `<int>`; only what does not fit becomes `<i8>`.
pub fn int(n: impl TryInto<i64>) -> Value {
    let n = n.try_into().unwrap_or(i64::MAX);
    i32::try_from(n).map_or(Value::Int64(n), Value::Int)
}

pub fn text(text: impl ToString) -> Value {
    Value::String(text.to_string())
}

pub fn structure<const N: usize>(fields: [(&str, Value); N]) -> Value {
    Value::Struct(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

pub fn texts<T: ToString>(list: impl IntoIterator<Item = T>) -> Value {
    Value::Array(list.into_iter().map(text).collect())
}

pub fn or_nil(value: Option<Value>) -> Value {
    value.unwrap_or(Value::Nil)
}

/// Data that a job or event kept.
pub fn from_json(json: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match json {
        Json::Null => Value::Nil,
        Json::Bool(b) => Value::Bool(*b),
        Json::Number(n) => match (n.as_i64(), n.as_f64()) {
            (Some(n), _) => int(n),
            (None, Some(double)) => Value::Double(double),
            (None, None) => text(n),
        },
        Json::String(s) => text(s),
        Json::Array(list) => Value::Array(list.iter().map(from_json).collect()),
        Json::Object(map) => Value::Struct(map.iter().map(|(k, v)| (k.clone(), from_json(v))).collect()),
    }
}

/// A caller's structure for a reader of JSON; what JSON has no word for is refused.
pub fn to_json(value: &Value) -> Result<serde_json::Value, &'static str> {
    use serde_json::Value as Json;
    Ok(match value {
        Value::Nil => Json::Null,
        Value::Bool(b) => Json::Bool(*b),
        Value::Int(n) => Json::from(*n),
        Value::Int64(n) => Json::from(*n),
        Value::String(text) => Json::String(text.clone()),
        Value::Array(list) => Json::Array(list.iter().map(to_json).collect::<Result<_, _>>()?),
        Value::Struct(map) => {
            let fields = map.iter().map(|(name, value)| Ok((name.clone(), to_json(value)?)));
            Json::Object(fields.collect::<Result<_, &'static str>>()?)
        }
        Value::Double(_) | Value::DateTime(_) | Value::Base64(_) => {
            return Err(
                "holds a double, a date or binary data; allowed: strings, ints, booleans, structs, arrays, nil",
            );
        }
    })
}

/// How much of a caller's parameters a job keeps, bytes.
const SHOWN_BYTES: usize = 16 * 1024;

/// A caller's parameters as a job may show them: secrets masked, long texts cut, and no more than 16 KiB.
pub fn to_json_masked(value: &Value) -> serde_json::Value {
    masked("", value, &mut SHOWN_BYTES.clone())
}

/// Does something of this name hold a secret?
pub(super) fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["passw", "secret", "credential", "private", "token"].iter().any(|part| name.contains(part))
        || name == "vncp"
}

fn masked(name: &str, value: &Value, left: &mut usize) -> serde_json::Value {
    use serde_json::Value as Json;
    if *left == 0 {
        return Json::String("…".to_owned());
    }
    *left = left.saturating_sub(8 + name.len());
    if is_secret(name) && !matches!(value, Value::Nil | Value::Bool(_)) {
        return Json::String("***".to_owned());
    }
    match value {
        Value::Int(n) => Json::from(*n),
        Value::Int64(n) => Json::from(*n),
        Value::Bool(b) => Json::from(*b),
        Value::Double(d) => Json::from(*d),
        Value::String(s) => {
            let shown = masked_text(s);
            *left = left.saturating_sub(shown.len());
            Json::String(shown)
        }
        Value::DateTime(d) => Json::String(format!("{d:?}")),
        Value::Base64(bytes) => Json::String(format!("{} bytes", bytes.len())),
        Value::Nil => Json::Null,
        Value::Array(list) => Json::Array(list.iter().map(|v| masked("", v, left)).collect()),
        Value::Struct(map) => {
            Json::Object(map.iter().map(|(k, v)| (k.clone(), masked(k, v, left))).collect())
        }
    }
}

/// Between the parts of a device text, a command line, a query.
fn is_separator(c: char) -> bool {
    c.is_whitespace() || ",;&|".contains(c)
}

/// Device texts, command lines and the like hold `key=value` or `key:value` parts; those with a secret's name lose
/// their value.
fn masked_text(text: &str) -> String {
    // Private keys, and credentials in URLs; before it is cut, so that no half of one is left.
    let cut: String = redact(text, &[]).chars().take(512).collect();
    let mut shown = String::with_capacity(cut.len());
    let mut rest = cut.as_str();
    while let Some(at) = rest.find(['=', ':']) {
        let (before, after) = rest.split_at(at + 1);
        shown.push_str(before);
        rest = after;
        let key = before[..at].trim_end().rsplit(is_separator).next().unwrap_or_default();
        if is_secret(key.trim_matches(|c: char| !c.is_ascii_alphanumeric())) {
            let value = after.trim_start();
            shown.push_str(&after[..after.len() - value.len()]);
            let length = value_length(value);
            if length > 0 {
                shown.push_str("***");
            }
            rest = &value[length..];
        }
    }
    shown.push_str(rest);
    shown
}

/// To the end of the quotation that it begins with, else to the next separator.
fn value_length(value: &str) -> usize {
    let Some(quote) = value.chars().next().filter(|c| matches!(c, '"' | '\'')) else {
        return value.find(is_separator).unwrap_or(value.len());
    };
    let mut escaped = false;
    for (at, c) in value.char_indices().skip(1) {
        if c == quote && !escaped {
            return at + 1;
        }
        escaped = c == '\\' && !escaped;
    }
    value.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_in_parameters_are_masked_wherever_they_stand() {
        let value = structure([
            ("vfb", texts(["type=vnc,vncpasswd=geheim1,keymap=de"])),
            ("password", text("geheim2")),
            ("deep", structure([("bmc_password", text("geheim3"))])),
            ("pem", text("-----BEGIN PRIVATE KEY-----\ngeheim4\n-----END PRIVATE KEY-----")),
            ("url", text("https://admin:geheim5@manager.example:7001/api")),
            ("long", text(format!("{}https://admin:geheim6@m/", "x".repeat(495)))),
            ("name", text("web1")),
        ]);
        let json = to_json_masked(&value).to_string();
        assert!(!json.contains("geheim"), "{json}");
        assert!(json.contains("web1") && json.contains("keymap=de"), "{json}");
    }

    #[test]
    fn secrets_within_a_text_are_masked_whatever_separates_them() {
        for (text, shown) in [
            ("console=hvc0 password=geheimA quiet", "console=hvc0 password=*** quiet"),
            ("a=b;secret=geheim&x=y|token:geheim", "a=b;secret=***&x=y|token:***"),
            ("root_password = geheim,x", "root_password = ***,x"),
            ("a passwd=\"geheim \\\" geheim\" b", "a passwd=*** b"),
            ("{\"password\": \"geheim\", \"n\": 1}", "{\"password\": ***, \"n\": 1}"),
            ("x:password=geheim=geheim:geheim y", "x:password=*** y"),
            ("password=", "password="),
            ("file:/OVS/a.img,xvda,w", "file:/OVS/a.img,xvda,w"),
        ] {
            assert_eq!(masked_text(text), shown);
        }
    }

    #[test]
    fn a_managers_own_key_with_a_secrets_name_is_masked() {
        let value = structure([("params", structure([("OVM_admin_password", text("geheim"))]))]);
        assert!(!to_json_masked(&value).to_string().contains("geheim"));
    }
}
