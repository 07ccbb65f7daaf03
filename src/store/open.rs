//! Opening.
use super::Store;
use super::options::{OpenError, Opened, Options};

impl Store {
    /// Opens the store of a folder, rebuilding it if it is damaged. Blocking.
    pub fn open(options: Options) -> Result<Opened, OpenError> {
        Err(OpenError::Failed { dir: options.dir, why: "in work".to_owned() })
    }
}
