//! The process's randomness under the seed: what libraries draw from the system (the
//! order of hash maps, and with it tokio's choice among ready branches) comes from here,
//! once it is sown.
#![allow(unsafe_code, reason = "the system's own function is replaced, and it takes a pointer")]

use std::sync::Mutex;

use rand::{Rng, SeedableRng, rngs::StdRng};

static SOURCE: Mutex<Option<StdRng>> = Mutex::new(None);

/// From here on the system's randomness is this seed's.
pub fn sow(seed: u64) {
    *SOURCE.lock().unwrap() = Some(StdRng::seed_from_u64(seed));
}

/// Stands for libc's function of this name, which std and others find by it.
///
/// # Safety
/// As libc's: `buffer` has `length` bytes to be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buffer: *mut u8, length: usize, _flags: u32) -> isize {
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer, length) };
    match SOURCE.lock() {
        // Before it is sown anything will do: nothing of the simulation has begun.
        Ok(mut source) => match source.as_mut() {
            Some(source) => source.fill_bytes(bytes),
            None => bytes.fill(0x5a),
        },
        Err(_) => return -1,
    }
    length as isize
}
