//! What is around each stored value: `magic+version (1) | schema (2, BE) | crc32c (4, BE) | JSON`.
//!
//! The checksum covers the schema and the JSON. The engine has checksums of its own pages; ours also finds
//! what it mixes up.

use super::StoreError;

/// 0xD in the upper half says that it is ours; the lower half is the envelope's version.
const MAGIC: u8 = 0xD1;
const HEAD_BYTES: usize = 7;

pub(super) fn seal(schema: u16, json: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::with_capacity(HEAD_BYTES + json.len());
    sealed.push(MAGIC);
    sealed.extend_from_slice(&schema.to_be_bytes());
    sealed.extend_from_slice(&checksum(schema, json).to_be_bytes());
    sealed.extend_from_slice(json);
    sealed
}

/// The schema and the JSON inside, if the envelope is whole.
pub(super) fn open(sealed: &[u8]) -> Result<(u16, &[u8]), StoreError> {
    let damaged = |what: &str| StoreError::Damaged(what.to_owned());
    let [magic, s0, s1, c0, c1, c2, c3, json @ ..] = sealed else {
        return Err(damaged("a value is shorter than its envelope"));
    };
    if *magic != MAGIC {
        return Err(damaged("a value has an unknown envelope"));
    }
    let schema = u16::from_be_bytes([*s0, *s1]);
    if checksum(schema, json) != u32::from_be_bytes([*c0, *c1, *c2, *c3]) {
        return Err(damaged("a value does not match its checksum"));
    }
    Ok((schema, json))
}

/// The JSON inside, if the envelope is whole and of this schema.
pub(super) fn open_as<'a>(table: &str, schema: u16, sealed: &'a [u8]) -> Result<&'a [u8], StoreError> {
    match open(sealed) {
        Ok((found, json)) if found == schema => Ok(json),
        Ok((found, _)) => Err(StoreError::Damaged(format!(
            "table {table} holds a value of schema {found}, this release reads schema {schema}"
        ))),
        Err(StoreError::Damaged(why)) => Err(StoreError::Damaged(format!("table {table}: {why}"))),
        Err(other) => Err(other),
    }
}

fn checksum(schema: u16, json: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&schema.to_be_bytes()), json)
}

/// A row's part of its table's sum: depends on the key and on every bit of the sealed value.
pub(super) fn fingerprint(key: &[u8], sealed: &[u8]) -> u64 {
    let key_crc = u64::from(crc32c::crc32c(key));
    let value_crc = u64::from(crc32c::crc32c_append(key_crc as u32 ^ 0x5bd1_e995, sealed));
    // Mixed, so that the sum of two rows is not the sum of two others whose keys or values were swapped.
    let mut mixed = (key_crc << 32) | value_crc;
    mixed = (mixed ^ (mixed >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_flipped_bit_of_an_envelope_is_found(
            schema: u16,
            json in proptest::collection::vec(any::<u8>(), 0..200),
            bit: prop::sample::Index,
        ) {
            let mut sealed = seal(schema, &json);
            prop_assert_eq!(open(&sealed).unwrap(), (schema, json.as_slice()));
            let before = fingerprint(b"key", &sealed);
            let bit = bit.index(sealed.len() * 8);
            sealed[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(open(&sealed).is_err());
            prop_assert_ne!(before, fingerprint(b"key", &sealed));
        }
    }

    #[test]
    fn a_value_of_another_schema_is_refused_by_name() {
        let sealed = seal(2, b"{}");
        let error = open_as("vm", 1, &sealed).unwrap_err();
        assert!(error.to_string().contains("schema 2"), "{error}");
    }
}
