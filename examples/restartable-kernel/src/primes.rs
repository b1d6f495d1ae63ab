//! A program that knows nothing of persistence: it finds primes.
//!
//! All it has is its memory, which is zeros when it begins, and its stack.

/// Finds prime numbers by dividing by those that it found before.
#[repr(C)]
pub struct Primes {
    found: u64,
    candidate: u64,
    known: [u32; 8000],
}

impl Primes {
    /// The next prime: which one it is, counted from 1, and the prime.
    pub fn next(&mut self) -> (u64, u64) {
        loop {
            self.candidate = self.candidate.max(1) + 1;
            if self.is_prime() {
                break;
            }
        }
        if let Some(free) = self.known.get_mut(self.found as usize) {
            *free = self.candidate as u32;
        }
        self.found += 1;
        (self.found, self.candidate)
    }

    fn is_prime(&self) -> bool {
        for known in &self.known[..self.known.len().min(self.found as usize)] {
            let known = u64::from(*known);
            if known * known > self.candidate {
                return true;
            }
            if self.candidate.is_multiple_of(known) {
                return false;
            }
        }
        true
    }
}
