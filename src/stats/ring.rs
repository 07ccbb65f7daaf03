//! The ring file of one object: its series side by side, in three tiers of rows that are written over when they are
//! too old.
//!
//! ```text
//! "dom0dRR1"  length of the head (u32)  its CRC-32C (u32)  the series, one a line, padded with line ends to 8 bytes
//! 120 rows of a minute   168 rows of an hour   365 rows of a day
//! a row:  slot (u32)  CRC-32C of slot and values (u32)  one f32 a series; NaN: not known
//! ```
//!
//! All numbers are little-endian. A row's slot is the time in its tier's unit since 1970, and it lies at slot modulo
//! rows: a row of another slot there is one that is too old, so that a time without an agent leaves no lies behind. A
//! row whose check fails (a torn write, a bad disk) counts as not there. A row is written once, when its time is over;
//! nothing is flushed by force, since a crash of the machine may cost the last half minute of a history.
//!
//! Files are opened for a call and closed after it: what is not looked at takes no memory.

use super::series::SeriesKey;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

const MAGIC: &[u8; 8] = b"dom0dRR1";
/// Magic, length and check of the head.
const FIXED_BYTES: usize = 16;
/// A head longer than this is none of ours.
const MAX_HEAD_BYTES: usize = 256 * 1024;
/// Slot and check of a row.
const ROW_HEAD_BYTES: usize = 8;

/// A tier in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    Minute,
    Hour,
    Day,
}

impl Tier {
    pub const ALL: [Self; 3] = [Self::Minute, Self::Hour, Self::Day];

    pub fn seconds(self) -> u64 {
        match self {
            Self::Minute => 60,
            Self::Hour => 3600,
            Self::Day => 86_400,
        }
    }

    pub fn rows(self) -> u32 {
        match self {
            Self::Minute => 120,
            Self::Hour => 168,
            Self::Day => 365,
        }
    }
}

/// The rows of one tier that hold, by slot, oldest first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rows {
    width: usize,
    slots: Vec<u32>,
    values: Vec<f32>,
}

impl Rows {
    pub fn get(&self, slot: u32) -> Option<&[f32]> {
        let at = self.slots.binary_search(&slot).ok()?;
        self.values.get(at * self.width..(at + 1) * self.width)
    }

    pub fn slots(&self) -> &[u32] {
        &self.slots
    }
}

/// An open ring file.
#[derive(Debug)]
pub struct Ring {
    file: File,
    series: Vec<SeriesKey>,
    head_bytes: usize,
}

fn check(slot: u32, values: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&slot.to_le_bytes()), values)
}

/// The lines of the head, padded.
fn head(series: &[SeriesKey]) -> Vec<u8> {
    let mut lines = Vec::new();
    for key in series {
        lines.extend_from_slice(key.to_string().as_bytes());
        lines.push(b'\n');
    }
    lines.resize(lines.len().next_multiple_of(8), b'\n');
    let mut head = Vec::with_capacity(FIXED_BYTES + lines.len());
    head.extend_from_slice(MAGIC);
    head.extend_from_slice(&u32::try_from(lines.len()).unwrap_or(u32::MAX).to_le_bytes());
    head.extend_from_slice(&crc32c::crc32c(&lines).to_le_bytes());
    head.extend_from_slice(&lines);
    head
}

fn number(bytes: &[u8]) -> u32 {
    bytes.try_into().map_or(0, u32::from_le_bytes)
}

impl Ring {
    /// `None`: there is none, or it is not one that we can read; it is then made anew.
    pub fn open(path: &Path) -> io::Result<Option<Self>> {
        let mut file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut fixed = [0; FIXED_BYTES];
        if file.read_exact(&mut fixed).is_err() || &fixed[..8] != MAGIC {
            return Ok(None);
        }
        let length = usize::try_from(number(&fixed[8..12])).unwrap_or(usize::MAX);
        if length > MAX_HEAD_BYTES {
            return Ok(None);
        }
        let mut lines = vec![0; length];
        if file.read_exact(&mut lines).is_err() || crc32c::crc32c(&lines) != number(&fixed[12..]) {
            return Ok(None);
        }
        let Ok(lines) = String::from_utf8(lines) else { return Ok(None) };
        // A metric that is no more leaves its column, under no name that anybody asks for.
        let series = lines.lines().filter(|line| !line.is_empty()).map(SeriesKey::read).collect();
        Ok(Some(Self { file, series, head_bytes: FIXED_BYTES + length }))
    }

    /// A new file with these series beside each other, and what `old` has of them. Takes the place of the old one at
    /// once or not at all.
    pub fn create(path: &Path, series: Vec<SeriesKey>, old: Option<&Self>) -> io::Result<Self> {
        let making = path.with_extension("new");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&making)?;
        let head = head(&series);
        (&file).write_all(&head)?;
        let new = Self { file, series, head_bytes: head.len() };
        if let Some(old) = old {
            let places: Vec<Option<usize>> =
                new.series.iter().map(|key| old.series.iter().position(|other| other == key)).collect();
            for tier in Tier::ALL {
                let rows = old.rows(tier)?;
                for slot in rows.slots() {
                    let row = rows.get(*slot).unwrap_or_default();
                    let value = |place: &Option<usize>| place.and_then(|at| row.get(at).copied());
                    let row: Vec<f32> = places.iter().map(|place| value(place).unwrap_or(f32::NAN)).collect();
                    new.write(tier, *slot, &row)?;
                }
            }
        }
        // Else a loss of power could leave the new name with nothing behind it.
        new.file.sync_all()?;
        std::fs::rename(&making, path)?;
        Ok(new)
    }

    pub fn series(&self) -> &[SeriesKey] {
        &self.series
    }

    /// The series of which anything is known.
    pub fn live_series(&self) -> io::Result<Vec<SeriesKey>> {
        let mut live = vec![false; self.series.len()];
        for tier in Tier::ALL {
            let rows = self.rows(tier)?;
            for row in rows.slots().iter().filter_map(|slot| rows.get(*slot)) {
                live.iter_mut().zip(row).for_each(|(live, value)| *live |= value.is_finite());
            }
        }
        Ok(self.series.iter().zip(live).filter(|(_, live)| *live).map(|(key, _)| key.clone()).collect())
    }

    fn row_bytes(&self) -> usize {
        ROW_HEAD_BYTES + 4 * self.series.len()
    }

    fn place(&self, tier: Tier, slot: u32) -> u64 {
        let before: u32 = Tier::ALL.iter().filter(|other| **other < tier).map(|tier| tier.rows()).sum();
        let row = u64::from(before) + u64::from(slot % tier.rows());
        self.head_bytes as u64 + row * self.row_bytes() as u64
    }

    /// One row, of as many values as there are series.
    pub fn write(&self, tier: Tier, slot: u32, values: &[f32]) -> io::Result<()> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut row = Vec::with_capacity(self.row_bytes());
        row.extend_from_slice(&slot.to_le_bytes());
        row.extend_from_slice(&check(slot, &bytes).to_le_bytes());
        row.extend_from_slice(&bytes);
        self.file.write_all_at(&row, self.place(tier, slot))
    }

    /// All rows of a tier that hold.
    pub fn rows(&self, tier: Tier) -> io::Result<Rows> {
        let (row_bytes, rows) = (self.row_bytes(), usize::try_from(tier.rows()).unwrap_or(0));
        let mut bytes = vec![0; row_bytes * rows];
        let mut read = 0;
        let begin = self.place(tier, 0);
        // The file ends where nothing was written yet.
        while read < bytes.len() {
            match self.file.read_at(&mut bytes[read..], begin + read as u64) {
                Ok(0) => break,
                Ok(count) => read += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let mut found: Vec<(u32, &[u8])> = Vec::new();
        for row in bytes[..read].chunks_exact(row_bytes) {
            let (slot, values) = (number(&row[..4]), &row[ROW_HEAD_BYTES..]);
            if slot != 0 && number(&row[4..8]) == check(slot, values) {
                found.push((slot, values));
            }
        }
        found.sort_unstable_by_key(|(slot, _)| *slot);
        let value = |four: &[u8]| f32::from_bits(number(four));
        Ok(Rows {
            width: self.series.len(),
            slots: found.iter().map(|(slot, _)| *slot).collect(),
            values: found.iter().flat_map(|(_, row)| row.chunks_exact(4).map(value)).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> SeriesKey {
        SeriesKey::parse(text).unwrap()
    }

    #[test]
    fn a_row_is_read_as_it_was_written_and_an_old_one_in_its_place_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm");
        let series = vec![key("cpu_time"), key("vif_rx_bytes:0")];
        let ring = Ring::create(&path, series.clone(), None).unwrap();
        ring.write(Tier::Minute, 29_000_000, &[0.5, f32::NAN]).unwrap();
        ring.write(Tier::Minute, 29_000_001, &[1.5, 7.0]).unwrap();
        ring.write(Tier::Day, 20_000, &[2.0, 3.0]).unwrap();
        let ring = Ring::open(&path).unwrap().unwrap();
        assert_eq!(ring.series(), series);
        let minutes = ring.rows(Tier::Minute).unwrap();
        assert_eq!(minutes.slots(), [29_000_000, 29_000_001]);
        assert_eq!(minutes.get(29_000_001), Some(&[1.5, 7.0][..]));
        assert!(minutes.get(29_000_000).unwrap()[1].is_nan());
        assert_eq!(ring.rows(Tier::Day).unwrap().get(20_000), Some(&[2.0, 3.0][..]));
        assert!(ring.rows(Tier::Hour).unwrap().slots().is_empty());
        ring.write(Tier::Minute, 29_000_120, &[9.0, 9.0]).unwrap();
        assert_eq!(ring.rows(Tier::Minute).unwrap().slots(), [29_000_001, 29_000_120]);
    }

    #[test]
    fn a_series_that_comes_leaves_the_others_what_they_have() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm");
        let old = Ring::create(&path, vec![key("memory"), key("cpu_time")], None).unwrap();
        old.write(Tier::Hour, 480_000, &[4096.0, 0.25]).unwrap();
        let series = vec![key("cpu_time"), key("vcpus"), key("memory")];
        Ring::create(&path, series, Some(&old)).unwrap();
        let ring = Ring::open(&path).unwrap().unwrap();
        let rows = ring.rows(Tier::Hour).unwrap();
        let row = rows.get(480_000).unwrap();
        assert_eq!((row[0], row[2]), (0.25, 4096.0));
        assert!(row[1].is_nan());
    }

    #[test]
    fn a_damaged_row_is_not_there_and_a_damaged_head_is_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm");
        let ring = Ring::create(&path, vec![key("memory")], None).unwrap();
        ring.write(Tier::Minute, 29_000_000, &[1.0]).unwrap();
        ring.write(Tier::Minute, 29_000_001, &[2.0]).unwrap();
        ring.file.write_all_at(&[0xff], ring.place(Tier::Minute, 29_000_000) + 9).unwrap();
        assert_eq!(ring.rows(Tier::Minute).unwrap().slots(), [29_000_001]);
        let good = std::fs::read(&path).unwrap();
        for (at, byte) in good.iter().enumerate().take(ring.head_bytes) {
            let mut bad = good.clone();
            bad[at] = byte ^ 0x41;
            std::fs::write(&path, &bad).unwrap();
            assert!(Ring::open(&path).unwrap().is_none(), "byte {at}");
        }
        for length in [0, 3, 12, 20] {
            std::fs::write(&path, &good[..length]).unwrap();
            assert!(Ring::open(&path).unwrap().is_none(), "{length} bytes");
        }
    }

    #[test]
    fn a_series_takes_less_than_four_kib_of_disk() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm");
        let series: Vec<SeriesKey> = (0..14).map(|n| key(&format!("vif_rx_bytes:{n}"))).collect();
        let ring = Ring::create(&path, series, None).unwrap();
        for tier in Tier::ALL {
            for slot in 1..=tier.rows() {
                ring.write(tier, slot, &[1.0; 14]).unwrap();
            }
        }
        let on_disk = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(on_disk <= 14 * 4096, "{on_disk} bytes for 14 series");
    }
}
