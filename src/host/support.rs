//! What goes to support: text files by name, bounded, with every secret masked.
//!
//! This room says which pieces there are and masks them; whoever asks (an operation) brings their texts.

use std::collections::BTreeMap;

/// One text is at most so long; of a longer one the end is kept, where a log tells the news.
pub const MAX_TEXT_BYTES: usize = 256 * 1024;
const MASK: &str = "***";

/// A text that a support bundle has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// A log by the machine's name for it.
    Log(&'static str),
    Settings,
    HostRecord,
    StoreCheck,
    Jobs,
    Events,
    Locks,
}

/// Everything that is asked for, with the name of its file.
pub const PIECES: [(&str, Piece); 10] = [
    ("ovs-agent.log", Piece::Log("ovs-agent")),
    ("messages.log", Piece::Log("messages")),
    ("xend.log", Piece::Log("xend")),
    ("dmesg.log", Piece::Log("dmesg")),
    ("settings.json", Piece::Settings),
    ("host.json", Piece::HostRecord),
    ("store-check.txt", Piece::StoreCheck),
    ("jobs.json", Piece::Jobs),
    ("events.json", Piece::Events),
    ("locks.json", Piece::Locks),
];

/// The bundle: file name to text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SupportFiles(BTreeMap<&'static str, String>);

impl SupportFiles {
    /// Masks, bounds and keeps a piece. What could not be had is a text as well: why.
    pub fn add(&mut self, name: &'static str, text: &str, secrets: &[&str]) {
        // Masked before it is cut: half a secret would not be found.
        self.0.insert(name, end_of(&redact(text, secrets)));
    }

    pub fn into_files(self) -> BTreeMap<&'static str, String> {
        self.0
    }
}

fn end_of(text: &str) -> String {
    if text.len() <= MAX_TEXT_BYTES {
        return text.to_owned();
    }
    const NOTE: &str = "[earlier text left out]\n";
    let mut from = text.len() - (MAX_TEXT_BYTES - NOTE.len());
    while !text.is_char_boundary(from) {
        from += 1;
    }
    format!("{NOTE}{}", &text[from..])
}

/// The text without the secrets, as they are and as XML, JSON and HTTP Basic write them; without private keys;
/// and without credentials in URLs.
pub fn redact(text: &str, secrets: &[&str]) -> String {
    let mut forms: Vec<String> = secrets.iter().filter(|s| !s.is_empty()).flat_map(|s| written(s)).collect();
    // The longest first, so that a secret within another leaves no rest of it.
    forms.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
    forms.dedup();
    let masked = forms.iter().fold(text.to_owned(), |text, form| text.replace(form.as_str(), MASK));
    without_userinfo(&without_private_keys(&masked))
}

fn written(secret: &str) -> Vec<String> {
    use base64::Engine;
    let base64 = base64::engine::general_purpose::STANDARD;
    let xml = secret.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let json = serde_json::to_string(secret).unwrap_or_default();
    let json = json.trim_start_matches('"').trim_end_matches('"').to_owned();
    let basic = base64.encode(format!("{}:{secret}", super::password::USER));
    // A secret with a quote at its end would lose more than JSON's quotes; the plain form finds it.
    [secret.to_owned(), xml, json, basic].into_iter().filter(|form| !form.is_empty()).collect()
}

fn without_private_keys(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut hidden = false;
    for line in text.split_inclusive('\n') {
        if line.contains("-----BEGIN") && line.contains("PRIVATE KEY-----") {
            hidden = true;
            kept.push_str(MASK);
            kept.push('\n');
        }
        if !hidden {
            kept.push_str(line);
        }
        if hidden && line.contains("-----END") {
            hidden = false;
        }
    }
    kept
}

/// `https://user:password@host` becomes `https://***@host`.
fn without_userinfo(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        kept.push_str(before);
        let end = after.find(|c: char| c.is_whitespace() || "/?#\"'<>".contains(c)).unwrap_or(after.len());
        rest = match after[..end].rfind('@') {
            Some(at) => {
                kept.push_str(MASK);
                &after[at..]
            }
            None => after,
        };
    }
    kept.push_str(rest);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_masked_in_every_writing() {
        let secret = "pä<ss>&\"w\\ord";
        let text = format!(
            "plain {secret} xml pä&lt;ss&gt;&amp;\"w\\ord json \"pä<ss>&\\\"w\\\\ord\" basic {}",
            base64::Engine::encode(&base64::engine::general_purpose::STANDARD, format!("oracle:{secret}"))
        );
        assert_eq!(redact(&text, &[secret]), "plain *** xml *** json \"***\" basic ***");
    }

    #[test]
    fn a_secret_within_another_leaves_no_rest_and_an_empty_one_masks_nothing() {
        assert_eq!(redact("longsecret secret", &["secret", "longsecret", ""]), "*** ***");
    }

    #[test]
    fn private_keys_and_credentials_in_urls_are_masked_without_being_known() {
        let text =
            "a\n-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----\nb https://u:p@h:7001/x?y c://";
        assert_eq!(redact(text, &[]), "a\n***\nb https://***@h:7001/x?y c://");
        assert_eq!(redact("-----BEGIN EC PRIVATE KEY-----\nMII (cut)", &[]), "***\n");
    }

    #[test]
    fn a_long_text_keeps_its_end_and_a_secret_at_the_cut_is_masked_first() {
        let mut files = SupportFiles::default();
        let text = format!("{}planted{}", "é".repeat(MAX_TEXT_BYTES), "x".repeat(MAX_TEXT_BYTES - 30));
        files.add("messages.log", &text, &["planted"]);
        let kept = &files.into_files()["messages.log"];
        assert!(kept.len() <= MAX_TEXT_BYTES && kept.ends_with('x') && !kept.contains("ted"));
        assert!(kept.starts_with("[earlier text left out]\né***x"), "{}", &kept[..40]);
    }

    proptest::proptest! {
        #[test]
        fn whatever_the_text_the_secret_is_gone(before in ".{0,40}", after in ".{0,40}", secret in "[a-zA-Z0-9]{6,20}") {
            let text = format!("{before}{secret}{after}");
            proptest::prop_assert!(!redact(&text, &[&secret]).contains(&secret));
        }
    }
}
