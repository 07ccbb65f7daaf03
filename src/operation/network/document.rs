//! One document of any size in a table of its own, as rows of bounded size: a network of thousands of links is larger than
//! a row of the store may be.

use crate::model::pieces;
use crate::store::{Key, Range, Store, StoreError, Table, Txn};
use serde::{Serialize, de::DeserializeOwned};

/// A piece of the document's JSON, and how many there are in all.
#[derive(Debug, Clone, Serialize, serde::Deserialize)]
pub struct Part {
    pieces: u32,
    text: String,
}

/// As text in JSON it may double.
const PIECE_BYTES: usize = 96 * 1024;

struct PartNumber(u32);

impl Key for PartNumber {
    fn bytes(&self) -> Vec<u8> {
        self.0.to_be_bytes().to_vec()
    }
}

/// Replaces the table's document. What an older, longer one had beyond is not read any more, and goes with it at last.
/// Answers how many bytes it has.
pub(super) fn write_document<T: Serialize>(txn: &mut Txn, table: &Table<Part>, document: &T) -> usize {
    let text = serde_json::to_string(document).expect("its maps have text keys, so it has a JSON form");
    let all: Vec<&str> = pieces(&text, PIECE_BYTES).collect();
    let count = u32::try_from(all.len()).unwrap_or(u32::MAX);
    for (number, piece) in (0..).zip(all) {
        txn.put(table, &PartNumber(number), &Part { pieces: count, text: piece.to_owned() });
    }
    text.len()
}

/// Deletes the document, whatever its size.
pub(super) async fn delete_document(
    store: &Store,
    txn: &mut Txn,
    table: &Table<Part>,
) -> Result<(), StoreError> {
    for (key, _) in store.scan(table, Range::all()).await? {
        txn.delete(table, key.as_slice());
    }
    Ok(())
}

pub(super) async fn read_document<T: DeserializeOwned>(
    store: &Store,
    table: &Table<Part>,
) -> Result<Option<T>, StoreError> {
    let rows = store.scan(table, Range::all()).await?;
    let Some((_, first)) = rows.first() else { return Ok(None) };
    let pieces = first.pieces as usize;
    if rows.len() < pieces {
        return Err(StoreError::Damaged(format!("table {} lacks a part of its document", table.name)));
    }
    let text: String = rows.iter().take(pieces).map(|(_, part)| part.text.as_str()).collect();
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|error| StoreError::Damaged(format!("table {}: {error}", table.name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: Table<Part> = Table::new("document", 1);

    #[tokio::test(start_paused = true)]
    async fn a_document_of_any_size_comes_back_and_a_shorter_one_after_it_too() {
        let store = Store::memory();
        for text in ["x".repeat(1_000_000), "é\"\\".repeat(100_000), "short".to_owned()] {
            let mut txn = Txn::new();
            write_document(&mut txn, &TABLE, &text);
            store.commit(txn).await.unwrap();
            assert_eq!(read_document::<String>(&store, &TABLE).await.unwrap().as_ref(), Some(&text));
        }
        let mut txn = Txn::new();
        delete_document(&store, &mut txn, &TABLE).await.unwrap();
        store.commit(txn).await.unwrap();
        assert_eq!(read_document::<String>(&store, &TABLE).await.unwrap(), None);
    }
}
