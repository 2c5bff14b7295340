//! Numbers from and into bytes: all little-endian, one behind the other.

/// Fills a buffer from its front.
pub(super) struct Put<'a>(pub(super) &'a mut [u8]);

impl Put<'_> {
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        let (front, rest) = core::mem::take(&mut self.0).split_at_mut(bytes.len());
        front.copy_from_slice(bytes);
        self.0 = rest;
    }
}

/// Takes values from the front of a buffer.
pub(super) struct Take<'a>(pub(super) &'a [u8]);

impl Take<'_> {
    pub(super) fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let (front, rest) = self.0.split_at(N);
        self.0 = rest;
        let mut bytes = [0; N];
        bytes.copy_from_slice(front);
        bytes
    }
    pub(super) fn number(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }
}
