//! Writing XML: elements that are always closed, text that is always escaped.

use std::fmt::Display;

/// How an element without content is written: the dialect does it both ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Empty {
    /// `<a/>`
    Short,
    /// `<a></a>`
    Long,
}

/// A document under construction.
#[derive(Debug)]
pub struct Xml {
    text: String,
    empty: Empty,
}

impl Xml {
    pub fn new(declaration: &str, empty: Empty) -> Self {
        Self { text: declaration.to_owned(), empty }
    }

    pub fn finish(self) -> String {
        self.text
    }

    /// An element with elements in it.
    pub fn node(&mut self, name: &str, inside: impl FnOnce(&mut Self)) {
        self.node_with(name, &[], inside);
    }

    pub fn node_with(&mut self, name: &str, attributes: &[(&str, &str)], inside: impl FnOnce(&mut Self)) {
        self.text.push('<');
        self.text.push_str(name);
        for (key, value) in attributes {
            self.text.push(' ');
            self.text.push_str(key);
            self.text.push_str("=\"");
            escape(value, &mut self.text);
            self.text.push('"');
        }
        let open = self.text.len();
        self.text.push('>');
        let start = self.text.len();
        inside(self);
        if self.text.len() == start && self.empty == Empty::Short {
            self.text.truncate(open);
            self.text.push_str("/>");
            return;
        }
        self.text.push_str("</");
        self.text.push_str(name);
        self.text.push('>');
    }

    /// An element with text in it.
    pub fn leaf(&mut self, name: &str, value: impl Display) {
        let value = value.to_string();
        self.node(name, |xml| escape(&value, &mut xml.text));
    }

    /// `True` or `False`, as Python writes them.
    pub fn flag(&mut self, name: &str, value: bool) {
        self.leaf(name, if value { "True" } else { "False" });
    }
}

/// What XML 1.0 can hold (section 2.2), escaped; the rest is left out.
fn escape(text: &str, into: &mut String) {
    for c in text.chars() {
        match c {
            '&' => into.push_str("&amp;"),
            '<' => into.push_str("&lt;"),
            '>' => into.push_str("&gt;"),
            '"' => into.push_str("&quot;"),
            '\t' | '\n' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'.. => into.push(c),
            _ => {}
        }
    }
}

/// An attribute's or a file's name as an element's: each word with a capital (`em_message_type` becomes
/// `Em_Message_Type`); `None` where no element can have it.
pub fn element_name(name: &str) -> Option<String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    let first = name.chars().next()?;
    if !(first.is_ascii_alphabetic() || first == '_') || name.len() > 128 || !name.chars().all(good) {
        return None;
    }
    let words = name.split('_').map(|word| {
        let mut letters = word.chars();
        letters.next().map_or_else(String::new, |l| l.to_ascii_uppercase().to_string() + letters.as_str())
    });
    Some(words.collect::<Vec<_>>().join("_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_xml_cannot_hold_is_left_out_and_the_rest_escaped() {
        let mut xml = Xml::new("", Empty::Short);
        xml.node_with("a", &[("k", "\"<")], |xml| xml.leaf("b", "x\u{0}\u{b}<&>]]>\u{ffff}y"));
        xml.leaf("c", "");
        assert_eq!(xml.finish(), "<a k=\"&quot;&lt;\"><b>x&lt;&amp;&gt;]]&gt;y</b></a><c/>");
    }

    #[test]
    fn a_name_that_is_no_elements_is_none() {
        assert_eq!(element_name("em_message_type").as_deref(), Some("Em_Message_Type"));
        assert_eq!(element_name("ahci_host_cap2").as_deref(), Some("Ahci_Host_Cap2"));
        for bad in ["", "0x", "a b", "a>", "é", "-a"] {
            assert_eq!(element_name(bad), None, "{bad:?}");
        }
    }
}
