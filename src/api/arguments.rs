//! From the wire's values to typed parameters. Every error names the verb, the parameter, what was wrong and
//! what is allowed.

use super::fault::{ApiFault, Result};
use crate::wire::Value;
use std::collections::BTreeMap;

/// The type of a parameter, as `system.methodSignature` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    Text,
    /// `int`, `i4` or `i8`.
    Int,
    Bool,
    Struct,
    Array,
    Any,
}

impl Type {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Text => "string",
            Self::Int => "int",
            Self::Bool => "boolean",
            Self::Struct => "struct",
            Self::Array => "array",
            Self::Any => "any",
        }
    }

    fn fits(self, value: &Value) -> bool {
        match self {
            Self::Text => matches!(value, Value::String(_)),
            Self::Int => matches!(value, Value::Int(_) | Value::Int64(_)),
            Self::Bool => matches!(value, Value::Bool(_)),
            Self::Struct => matches!(value, Value::Struct(_)),
            Self::Array => matches!(value, Value::Array(_)),
            Self::Any => true,
        }
    }
}

/// One parameter of a verb.
#[derive(Debug, Clone, Copy)]
pub struct Param {
    pub name: &'static str,
    pub kind: Type,
    pub optional: bool,
    pub help: &'static str,
}

pub const fn need(name: &'static str, kind: Type, help: &'static str) -> Param {
    Param { name, kind, optional: false, help }
}

pub const fn may(name: &'static str, kind: Type, help: &'static str) -> Param {
    Param { name, kind, optional: true, help }
}

/// The arguments of one call, checked against the verb's parameters.
#[derive(Debug)]
pub struct Arguments {
    verb: &'static str,
    values: BTreeMap<&'static str, Value>,
    /// The plan that is made of these is only to be shown: what costs much need not be computed.
    pub dry: bool,
}

impl Arguments {
    pub fn check(verb: &'static str, params: &'static [Param], values: Vec<Value>) -> Result<Self> {
        let least = params.iter().filter(|p| !p.optional).count();
        if values.len() < least || values.len() > params.len() {
            let names: Vec<String> = params
                .iter()
                .map(|p| if p.optional { format!("[{}]", p.name) } else { p.name.to_owned() })
                .collect();
            let text =
                format!("{verb} takes ({}), and was given {} parameters", names.join(", "), values.len());
            return Err(ApiFault::invalid(text));
        }
        let mut checked = BTreeMap::new();
        for (param, value) in params.iter().zip(values) {
            // A client that has nothing to say for an optional parameter often says nil.
            if param.optional && matches!(value, Value::Nil) {
                continue;
            }
            if !param.kind.fits(&value) {
                let text = format!(
                    "{verb}: {} is of the wrong type ({}); allowed: {}",
                    param.name,
                    type_name(&value),
                    param.kind.as_str()
                );
                return Err(ApiFault::invalid(text));
            }
            checked.insert(param.name, value);
        }
        Ok(Self { verb, values: checked, dry: false })
    }

    /// An error about one parameter.
    pub fn wrong(&self, name: &str, why: impl std::fmt::Display) -> ApiFault {
        ApiFault::invalid(format!("{}: {name}: {why}", self.verb))
    }

    pub fn value(&self, name: &str) -> Option<&Value> {
        self.values.get(name)
    }

    pub fn opt_text(&self, name: &str) -> Option<&str> {
        match self.values.get(name) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    pub fn text(&self, name: &str) -> Result<&str> {
        self.opt_text(name).ok_or_else(|| self.wrong(name, "is missing"))
    }

    pub fn opt_int(&self, name: &str) -> Option<i64> {
        self.values.get(name).and_then(int)
    }

    pub fn int(&self, name: &str) -> Result<i64> {
        self.opt_int(name).ok_or_else(|| self.wrong(name, "is missing"))
    }

    /// A number within a range.
    pub fn within(&self, name: &str, range: std::ops::RangeInclusive<i64>) -> Result<i64> {
        let n = self.int(name)?;
        if range.contains(&n) {
            return Ok(n);
        }
        Err(self.wrong(name, format!("{n} is out of range; allowed: {} to {}", range.start(), range.end())))
    }

    pub fn opt_bool(&self, name: &str) -> Option<bool> {
        match self.values.get(name) {
            Some(Value::Bool(b)) => Some(*b),
            _ => None,
        }
    }

    pub fn bool(&self, name: &str) -> Result<bool> {
        self.opt_bool(name).ok_or_else(|| self.wrong(name, "is missing"))
    }

    pub fn structure(&self, name: &str) -> Result<&BTreeMap<String, Value>> {
        match self.values.get(name) {
            Some(Value::Struct(map)) => Ok(map),
            _ => Err(self.wrong(name, "is missing")),
        }
    }

    pub fn array(&self, name: &str) -> Result<&[Value]> {
        match self.values.get(name) {
            Some(Value::Array(list)) => Ok(list),
            _ => Err(self.wrong(name, "is missing")),
        }
    }

    pub fn texts(&self, name: &str) -> Result<Vec<String>> {
        let text = |v: &Value| match v {
            Value::String(text) => Ok(text.clone()),
            other => Err(self.wrong(name, format!("holds a {}; allowed: strings", type_name(other)))),
        };
        self.array(name)?.iter().map(text).collect()
    }

    /// Parses a text parameter as one of our types.
    pub fn parse<T: std::str::FromStr>(&self, name: &str) -> Result<T>
    where
        T::Err: std::fmt::Display,
    {
        self.text(name)?.parse().map_err(|e| self.wrong(name, e))
    }
}

/// Fields of a struct of options: all optional, no others allowed.
pub struct Fields<'a> {
    arguments: &'a Arguments,
    name: &'static str,
    map: Option<&'a BTreeMap<String, Value>>,
}

impl<'a> Fields<'a> {
    pub fn of(arguments: &'a Arguments, name: &'static str, allowed: &[&str]) -> Result<Self> {
        let map = match arguments.values.get(name) {
            Some(Value::Struct(map)) => Some(map),
            _ => None,
        };
        if let Some(unknown) = map.and_then(|m| m.keys().find(|k| !allowed.contains(&k.as_str()))) {
            let why =
                format!("has no field {}; allowed: {}", crate::model::excerpt(unknown), allowed.join(", "));
            return Err(arguments.wrong(name, why));
        }
        Ok(Self { arguments, name, map })
    }

    fn wrong(&self, field: &str, value: &Value, allowed: &str) -> ApiFault {
        self.arguments.wrong(
            self.name,
            format!("{field} is of the wrong type or range ({}); allowed: {allowed}", type_name(value)),
        )
    }

    pub fn int(&self, field: &str) -> Result<Option<u64>> {
        match self.map.and_then(|m| m.get(field)) {
            None | Some(Value::Nil) => Ok(None),
            Some(value) => match int(value).and_then(|n| u64::try_from(n).ok()) {
                Some(n) => Ok(Some(n)),
                None => Err(self.wrong(field, value, "a whole number, 0 or more")),
            },
        }
    }

    pub fn text(&self, field: &str) -> Result<Option<String>> {
        match self.map.and_then(|m| m.get(field)) {
            None | Some(Value::Nil) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(self.wrong(field, other, "a string")),
        }
    }

    pub fn bool(&self, field: &str) -> Result<bool> {
        match self.map.and_then(|m| m.get(field)) {
            None | Some(Value::Nil) => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(self.wrong(field, other, "a boolean")),
        }
    }
}

pub fn int(value: &Value) -> Option<i64> {
    match value {
        Value::Int(n) => Some(i64::from(*n)),
        Value::Int64(n) => Some(*n),
        _ => None,
    }
}

pub fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Int(_) | Value::Int64(_) => "int",
        Value::Bool(_) => "boolean",
        Value::String(_) => "string",
        Value::Double(_) => "double",
        Value::DateTime(_) => "dateTime",
        Value::Base64(_) => "base64",
        Value::Struct(_) => "struct",
        Value::Array(_) => "array",
        Value::Nil => "nil",
    }
}
