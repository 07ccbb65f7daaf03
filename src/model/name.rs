//! Names, addresses and bounded texts as they may reach Xen, the kernel, or a path.

use super::{Invalid, excerpt, text_type};

/// The name of a VM, and so of its domain: `[A-Za-z0-9_.+:@-]`, 1 to 128 long, the first a letter, digit or `_`.
///
/// The characters are those that neither xl.cfg, XenStore, a path nor a log can read as anything but text
/// (xl.cfg(5); guides on "xl.cfg injection").
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VmName(String);

impl VmName {
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        const ALLOWED: &str = "1 to 128 letters, digits and _ . + : @ - (first a letter, digit or _)";
        let good = |c: u8| c.is_ascii_alphanumeric() || b"_.+:@-".contains(&c);
        let first = text.as_bytes().first().is_some_and(|c| c.is_ascii_alphanumeric() || *c == b'_');
        if first && text.len() <= 128 && text.bytes().all(good) && text != "Domain-0" {
            return Ok(Self(text.to_owned()));
        }
        let problem = if text == "Domain-0" {
            "is dom0's own".to_owned()
        } else {
            format!("{} is not one", excerpt(text))
        };
        Err(Invalid::new("VM name", problem, ALLOWED))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}
text_type!(VmName);

/// A network interface's name as the kernel takes it (`dev_valid_name`, net/core/dev.c): 1 to 15 bytes, no
/// `/`, `:`, white space, not `.` or `..`; and, narrower than the kernel, only `[A-Za-z0-9_.-]` without a
/// leading `-` and without `%`, which the kernel would read as a pattern.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IfName(String);

impl IfName {
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let good = |c: u8| c.is_ascii_alphanumeric() || b"_.-".contains(&c);
        let length = (1..=15).contains(&text.len());
        if length && text.bytes().all(good) && !text.starts_with('-') && text != "." && text != ".." {
            return Ok(Self(text.to_owned()));
        }
        Err(Invalid::new(
            "interface name",
            format!("{} is not one", excerpt(text)),
            "1 to 15 letters, digits and _ . - (not first a -)",
        ))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}
text_type!(IfName);

/// A bridge is an interface; the alias says what a field is for.
pub type BridgeName = IfName;

/// A unicast Ethernet address, shown in lower case with colons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac([u8; 6]);

impl Mac {
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        const ALLOWED: &str = "six two-digit hex numbers with colons, unicast, not all zero";
        let wrong =
            |problem: &str| Invalid::new("MAC address", format!("{} {problem}", excerpt(text)), ALLOWED);
        let mut bytes = [0_u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(|| wrong("is not one"))?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong("is not one"))?;
            if part.starts_with('+') {
                return Err(wrong("is not one"));
            }
        }
        if parts.next().is_some() {
            return Err(wrong("is too long"));
        }
        if bytes[0] & 1 != 0 {
            return Err(wrong("is a multicast address"));
        }
        if bytes == [0; 6] {
            return Err(wrong("is all zeros"));
        }
        Ok(Self(bytes))
    }

    pub fn from_bytes(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    pub fn as_bytes(&self) -> &[u8; 6] {
        &self.0
    }

    pub fn as_str(&self) -> String {
        let [a, b, c, d, e, f] = self.0;
        format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}
text_type!(Mac);

/// Text for people, kept and shown but never interpreted: at most `MAX` bytes of UTF-8 without control
/// characters other than tab and newline.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Text<const MAX: usize>(String);

impl<const MAX: usize> Text<MAX> {
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        if text.len() > MAX {
            let problem = format!("is {} bytes long, more than {MAX}", text.len());
            return Err(Invalid::new("text", problem, "a shorter text"));
        }
        if text.chars().any(|c| c.is_control() && c != '\n' && c != '\t') {
            return Err(Invalid::new(
                "text",
                "has control characters",
                "printable characters, tab and newline",
            ));
        }
        Ok(Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
impl<const MAX: usize> serde::Serialize for Text<MAX> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}
impl<'de, const MAX: usize> serde::Deserialize<'de> for Text<MAX> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// A short single-line text: keys, tags, aliases. At most 128 bytes, no control characters, not empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Label(String);

impl Label {
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let length = (1..=128).contains(&text.len());
        if length && !text.chars().any(char::is_control) {
            return Ok(Self(text.to_owned()));
        }
        Err(Invalid::new(
            "label",
            format!("{} is not one", excerpt(text)),
            "1 to 128 bytes, no control characters",
        ))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}
text_type!(Label);

/// An absolute path that stays where it says: `/` first, no empty, `.` or `..` part, each part at most 255
/// bytes and the whole at most 1,024, and only characters that xl's disk syntax cannot read as its own
/// (no comma, quote, white space, control character, bracket). Symbolic links are the opener's business.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SafePath(String);

impl SafePath {
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        const ALLOWED: &str =
            "an absolute path of letters, digits and / _ . + : @ = ~ -, without . or .. parts";
        let wrong = |problem: &str| Invalid::new("path", format!("{} {problem}", excerpt(text)), ALLOWED);
        let good = |c: u8| c.is_ascii_alphanumeric() || b"/_.+:@=~-".contains(&c);
        if !text.starts_with('/') {
            return Err(wrong("is not absolute"));
        }
        if text.len() > 1024 || !text.bytes().all(good) {
            return Err(wrong("is not one"));
        }
        for part in text[1..].split('/') {
            if part.is_empty() || part == "." || part == ".." || part.len() > 255 {
                return Err(wrong("has an empty, dotted or overlong part"));
            }
        }
        Ok(Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this path lies below the folder `root` (not `root` itself).
    pub fn is_below(&self, root: &SafePath) -> bool {
        self.0.strip_prefix(root.as_str()).is_some_and(|rest| rest.starts_with('/'))
    }
}
text_type!(SafePath);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_could_be_read_as_more_than_a_name_is_refused() {
        for bad in [
            "",
            "a\"b",
            "a'b",
            "a\nb",
            "a]b",
            "a,b",
            "-rf",
            "a b",
            "$(id)",
            "a;b",
            "é",
            "Domain-0",
            &"x".repeat(129),
        ] {
            assert!(VmName::parse(bad).is_err(), "{bad:?}");
        }
        for good in ["i-2-3-VM", "0004fb00", "web_1.example", "_x"] {
            assert_eq!(VmName::parse(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn a_path_cannot_leave_where_it_says() {
        for bad in ["", "x", "/", "/a/../b", "/a//b", "/a/./b", "/a/b,w", "/a b", "/a/'", "/a\n", "/a/"] {
            assert!(SafePath::parse(bad).is_err(), "{bad:?}");
        }
        let root = SafePath::parse("/OVS/Repositories").unwrap();
        assert!(SafePath::parse("/OVS/Repositories/r/d.raw").unwrap().is_below(&root));
        assert!(!SafePath::parse("/OVS/RepositoriesX/r").unwrap().is_below(&root));
        assert!(!root.is_below(&root));
    }

    #[test]
    fn an_interface_name_is_what_the_kernel_takes_and_no_pattern() {
        for bad in ["", ".", "..", "a/b", "eth%d", "sixteen-bytes-xx", "-x", "a b", "a:b", "a\0"] {
            assert!(IfName::parse(bad).is_err(), "{bad:?}");
        }
        assert!(IfName::parse("xenbr0.160").is_ok());
    }

    #[test]
    fn a_mac_is_unicast_and_not_zero() {
        for bad in [
            "",
            "02:00:50:9a:00",
            "02:00:50:9a:00:01:02",
            "03:00:50:9a:00:01",
            "00:00:00:00:00:00",
            "+2:00:50:9a:00:01",
        ] {
            assert!(Mac::parse(bad).is_err(), "{bad:?}");
        }
        assert_eq!(Mac::parse("02:00:50:9A:00:01").unwrap().as_str(), "02:00:50:9a:00:01");
    }
}
