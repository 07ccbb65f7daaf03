//! The last ten minutes of one object, in memory: a row each ten seconds.

use super::series::SeriesKey;

/// Seconds a row.
pub const SLOT_S: u64 = 10;
/// Rows: ten minutes.
pub const ROWS: u32 = 60;

/// Rows of as many values as there are series; a value that is not known is NaN.
#[derive(Debug, Clone)]
pub struct Recent {
    series: Vec<SeriesKey>,
    /// The slot of each row; 0: none.
    slots: [u32; ROWS as usize],
    /// Row by row.
    values: Vec<f32>,
    newest: u32,
}

fn place(slot: u32) -> usize {
    (slot % ROWS) as usize
}

impl Recent {
    /// With the columns that are known already.
    pub fn new(series: Vec<SeriesKey>) -> Self {
        let values = vec![f32::NAN; series.len() * ROWS as usize];
        Self { series, slots: [0; ROWS as usize], values, newest: 0 }
    }

    pub fn series(&self) -> &[SeriesKey] {
        &self.series
    }

    /// The slot of the last row that was put in.
    pub fn newest(&self) -> u32 {
        self.newest
    }

    /// Whether anything was put in of that time.
    pub fn has(&self, slot: u32) -> bool {
        self.slots[place(slot)] == slot
    }

    /// Puts a row in. Series that were never seen get a column, up to `most`; those of the object itself before those of
    /// its links and disks, of which there may be any number. Answers how many got none.
    pub fn put(&mut self, slot: u32, values: Vec<(SeriesKey, f32)>, most: usize) -> usize {
        let mut row = vec![f32::NAN; self.series.len()];
        let mut new = Vec::new();
        let mut guess = 0;
        for (key, value) in values {
            // They come in the same order each time.
            let found = match self.series.get(guess) {
                Some(series) if *series == key => Some(guess),
                _ => self.series.iter().position(|series| *series == key),
            };
            match found {
                Some(column) => {
                    row[column] = value;
                    guess = column + 1;
                }
                None => new.push((key, value)),
            }
        }
        new.sort_by_key(|(key, _)| key.instance().is_some());
        let left_out = new.len().saturating_sub(most.saturating_sub(self.series.len()));
        new.truncate(new.len() - left_out);
        if !new.is_empty() {
            let (keys, more): (Vec<_>, Vec<_>) = new.into_iter().unzip();
            self.widen(keys);
            row.extend(more);
        }
        let width = self.series.len();
        let at = place(slot);
        self.slots[at] = slot;
        self.values[at * width..(at + 1) * width].copy_from_slice(&row);
        self.newest = slot;
        left_out
    }

    fn widen(&mut self, keys: Vec<SeriesKey>) {
        let old = self.series.len();
        self.series.extend(keys);
        let mut values = Vec::with_capacity(self.series.len() * ROWS as usize);
        for row in 0..ROWS as usize {
            values.extend_from_slice(&self.values[row * old..(row + 1) * old]);
            values.resize((row + 1) * self.series.len(), f32::NAN);
        }
        self.values = values;
    }

    pub fn get(&self, slot: u32, column: usize) -> Option<f32> {
        let at = place(slot);
        if slot == 0 || self.slots[at] != slot || column >= self.series.len() {
            return None;
        }
        Some(self.values[at * self.series.len() + column]).filter(|value| value.is_finite())
    }

    /// The newest row, as far as it is known.
    pub fn last(&self) -> Vec<(SeriesKey, f32)> {
        let known = |(column, key): (usize, &SeriesKey)| Some((key.clone(), self.get(self.newest, column)?));
        self.series.iter().enumerate().filter_map(known).collect()
    }

    /// The means of a minute; `None` if nothing is known of it.
    pub fn minute(&self, minute: u32) -> Option<Vec<f32>> {
        let parts = u32::try_from(60 / SLOT_S).unwrap_or(1);
        let slots = minute.checked_mul(parts)?..minute.checked_add(1)?.checked_mul(parts)?;
        let mut row = Vec::with_capacity(self.series.len());
        for column in 0..self.series.len() {
            let known = slots.clone().filter_map(|slot| self.get(slot, column));
            let (sum, count) =
                known.fold((0.0_f64, 0_u32), |(sum, n), value| (sum + f64::from(value), n + 1));
            #[allow(clippy::cast_possible_truncation, reason = "a mean of f32 is one")]
            row.push(if count > 0 { (sum / f64::from(count)) as f32 } else { f32::NAN });
        }
        row.iter().any(|value| !value.is_nan()).then_some(row)
    }

    /// Whether there is a row that is not too old at this slot. A clock that was set back forgets nothing.
    pub fn reaches(&self, slot: u32) -> bool {
        slot.saturating_sub(self.newest) < ROWS
    }
}
