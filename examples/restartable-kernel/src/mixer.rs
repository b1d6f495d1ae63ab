//! A program that knows nothing of persistence: it stirs numbers.
//!
//! All it has is its memory, which is zeros when it begins, and its stack. Who judges it does the same
//! stirring elsewhere, with this very file.

/// Stirs numbers, whole and broken ones, so that one wrong bit spoils all that follows.
#[repr(C)]
pub struct Mixer {
    rounds: u64,
    state: u64,
    chaos: f64,
    words: [u64; 3000],
}

impl Default for Mixer {
    fn default() -> Self {
        Self {
            rounds: 0,
            state: 0,
            chaos: 0.0,
            words: [0; 3000],
        }
    }
}

impl Mixer {
    /// How many steps a round has.
    const STEPS: usize = 20_000;

    /// A round: which one it was, counted from 1, and what all that was stirred so far comes to.
    pub fn next(&mut self) -> (u64, u64) {
        let mut state = self.state;
        let mut chaos = if self.rounds == 0 { 0.3 } else { self.chaos };
        for step in 0..Self::STEPS {
            let at = (state >> 20) as usize % self.words.len();
            let word = &mut self.words[at];
            *word = word.rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ state ^ step as u64;
            chaos = chaos * 3.99 * (1.0 - chaos);
            state = state.rotate_left(23).wrapping_add(*word) ^ chaos.to_bits();
        }
        self.state = state;
        self.chaos = chaos;
        self.rounds += 1;
        (self.rounds, state)
    }
}
