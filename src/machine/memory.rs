//! How the allocator of glibc keeps memory: little. A management agent lives in a dom0 whose memory belongs to
//! the guests, and its work comes in short bursts (a password's hash, a large answer) after which the memory
//! must go back to the kernel.
//!
//! Elsewhere than on glibc (musl) there is nothing to set, and the functions do nothing.

/// Sets the allocator up; called once, at the start of a process, before it has threads.
///
/// - Two arenas at most: glibc makes one per thread up to eight per CPU, each keeps what was freed in it, and our
///   two workers need no more.
/// - Blocks of 128 KiB and more are mapped by themselves, so that they go back when freed. That is glibc's
///   start value too, but unless it is set it *rises* with each such block that is freed.
/// - The free end of the heap goes back from 128 KiB on.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
pub fn tune_allocator() {
    const KEEP_BYTES: libc::c_int = 128 * 1024;
    const ARENAS: libc::c_int = 2;
    // SAFETY: mallopt takes two integers, keeps no pointer, and locks what it changes. A value that it does not
    // like is ignored, which costs memory and nothing else.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEEP_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEEP_BYTES);
    }
}

/// Gives freed memory back to the kernel now, in the middle of the heap too. It walks the heap: for after a
/// burst (start, a password's hash, a discovery), not for each call.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code)]
pub fn give_back() {
    // SAFETY: malloc_trim takes a number, locks each arena while it works on it, and touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(not(target_env = "gnu"))]
pub fn tune_allocator() {}

#[cfg(not(target_env = "gnu"))]
pub fn give_back() {}

#[cfg(test)]
#[cfg(target_env = "gnu")]
mod tests {
    use super::*;

    fn resident_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn freed_memory_in_the_middle_of_the_heap_goes_back_to_the_kernel() {
        tune_allocator();
        let mut blocks: Vec<Vec<u8>> = (0..8192).map(|_| vec![1; 16 * 1024]).collect();
        let full = resident_kib();
        // One block in 64 stays, the last among them, so that the heap's end cannot simply be cut off.
        let mut index = 0;
        blocks.retain(|_| {
            index += 1;
            index % 64 == 0
        });
        give_back();
        let after = resident_kib();
        assert!(after + 48 * 1024 < full, "{full} KiB before, {after} KiB after");
        assert_eq!(blocks.len(), 128);
    }
}
