//! What is wrong with a declaration, and where.

use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The path: `links.bond0.mtu`.
    pub field: String,
    pub text: String,
}

impl Problem {
    pub fn new(field: impl Into<String>, text: impl Into<String>) -> Self {
        Self { field: field.into(), text: text.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.text)
    }
}

/// Problems as they are found; only the first are told.
#[derive(Debug, Default)]
pub(super) struct Problems {
    told: Vec<Problem>,
    more: usize,
}

impl Problems {
    const TOLD: usize = 20;

    pub fn add(&mut self, field: impl Into<String>, text: impl Into<String>) {
        if self.told.len() < Self::TOLD {
            self.told.push(Problem::new(field, text));
        } else {
            self.more += 1;
        }
    }

    pub fn is_empty(&self) -> bool {
        self.told.is_empty()
    }

    /// At most twenty; the last then says how many are not told.
    pub fn into_vec(mut self) -> Vec<Problem> {
        if self.more > 0
            && let Some(last) = self.told.last_mut()
        {
            last.text.push_str(&format!(" (and {} more problems)", self.more));
        }
        self.told
    }
}
