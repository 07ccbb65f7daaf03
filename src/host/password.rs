//! The agent's password: what one may be, and one made by chance. Its hash is the wire's business.

use crate::model::{Secret, excerpt};
use ring::rand::{SecureRandom, SystemRandom};

/// The dialect knows one user.
pub const USER: &str = "oracle";
const MAX_BYTES: usize = 256;
/// Letters and digits that nobody takes for each other: without 0 O o 1 l I.
const ALPHABET: &[u8] = b"23456789abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ";
const RANDOM_LENGTH: usize = 20;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PasswordError {
    #[error("user {0} is not known; allowed: {USER}")]
    User(String),
    #[error("the password is empty or longer than {MAX_BYTES} bytes; allowed: 1 to {MAX_BYTES} bytes")]
    Length,
    #[error("the password has control characters; allowed: any others")]
    Control,
    #[error("this machine gave no random numbers")]
    NoRandom,
}

/// The password, if it may be one. A colon is fine: HTTP Basic ends the user's name at the first one.
pub fn check(user: &str, password: &str) -> Result<Secret, PasswordError> {
    if user != USER {
        return Err(PasswordError::User(excerpt(user)));
    }
    if !(1..=MAX_BYTES).contains(&password.len()) {
        return Err(PasswordError::Length);
    }
    if password.chars().any(char::is_control) {
        return Err(PasswordError::Control);
    }
    Ok(Secret::new(password))
}

/// Twenty characters, each equally likely: 116 bits.
pub fn random() -> Result<Secret, PasswordError> {
    let random = SystemRandom::new();
    let mut password = String::with_capacity(RANDOM_LENGTH);
    while password.len() < RANDOM_LENGTH {
        let mut bytes = zeroize::Zeroizing::new([0_u8; 32]);
        random.fill(bytes.as_mut()).map_err(|_| PasswordError::NoRandom)?;
        // Six bits that name no letter are thrown away, so that no letter is likelier than another.
        let letters = bytes.iter().filter_map(|byte| ALPHABET.get(usize::from(byte & 0x3f)));
        password.extend(letters.take(RANDOM_LENGTH - password.len()).map(|letter| char::from(*letter)));
    }
    Ok(Secret::new(password))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_1_to_256_bytes_without_control_characters_for_the_user_oracle() {
        assert_eq!(check(USER, "a:b c é").unwrap().expose(), "a:b c é");
        assert!(check(USER, &"x".repeat(256)).is_ok());
        assert_eq!(check(USER, &"x".repeat(257)), Err(PasswordError::Length));
        assert_eq!(check(USER, ""), Err(PasswordError::Length));
        for bad in ["a\nb", "a\0", "\u{7f}", "\u{85}"] {
            assert_eq!(check(USER, bad), Err(PasswordError::Control));
        }
        assert!(matches!(check("root", "x"), Err(PasswordError::User(_))));
    }

    #[test]
    fn a_random_password_is_20_plain_characters_and_never_the_same() {
        let one = random().unwrap();
        assert_eq!(one.expose().len(), 20);
        assert!(one.expose().bytes().all(|c| ALPHABET.contains(&c)));
        assert_ne!(one, random().unwrap());
        assert!(!ALPHABET.iter().any(|c| b"0Oo1lI".contains(c)));
    }
}
