//! The live upgrade: handing over to another image in this process, and taking over from one. See
//! `farcall_abi::upgrade`.

use core::mem::MaybeUninit;

use farcall_abi::entry::{
    ENTRY_TABLE_OFFSET, ENTRY_TABLE_SIZE, EntryTable, IMAGE_MAGIC, IMAGE_VERSION,
};
use farcall_abi::upgrade::{HANDOVER_SIZE, Handover};

use crate::arch;
use crate::serve::{HangUp, Server};
use crate::start::handle_signals;
use crate::sys::{self, EAGAIN, EFAULT, EINVAL, POLLIN};

/// Called by the entry `resume`: serves from where the other image has stopped.
///
/// # Safety
///
/// `handover` is another image's, which never comes back, and does not lie on the stack.
pub unsafe extern "C" fn take_over(handover: *const Handover) {
    let mut server = Server::new();
    // SAFETY: the caller's promise: as many bytes as it says. What is missing stays zero. Nothing in
    // it is of a type that not all bytes are valid for.
    unsafe {
        let size = (*handover).size as usize;
        let to = (&raw mut server.state).cast::<u8>();
        to.copy_from_nonoverlapping(handover.cast(), size.min(HANDOVER_SIZE));
    }
    let before = server.state.image;
    // SAFETY: it is mapped until this one has answered, and read by itself: its entries tell how large it is.
    let size = unsafe { (*((before as usize + ENTRY_TABLE_OFFSET) as *const EntryTable)).size };
    handle_signals(before as usize, size as usize);
    // Nothing else waits to be sent: there is room.
    let _ = server.finish(before as i64);
    if server.state.watched.listen.fd >= 0 {
        server.listen();
    }
    server.serve(EAGAIN);
}

impl Server {
    /// The operation UPGRADE: if the image can take over this one is never heard of again.
    pub fn hand_over(&mut self) -> Result<(), HangUp> {
        let [image, ..] = self.state.request.args;
        let (error, resume) = self.check(image);
        if error != 0 {
            return self.finish(error);
        }
        self.flush()?;
        self.dismiss();
        self.state.watched.listen.events = POLLIN;
        self.state.size = HANDOVER_SIZE as u64;
        self.state.image = arch::image_address();
        // Where results wait to be sent, of which there are none any more. It is no part of the stack.
        let (input, size) = self.buffers();
        let handover = input.wrapping_add(size).cast::<Handover>();
        // SAFETY: there is room for as many bytes, and nobody has a reference to them.
        unsafe { handover.copy_from_nonoverlapping(&self.state, 1) };
        // SAFETY: the table says that the entry is there, and that it understands the handover, and the
        // kernel that all of it can be executed. That it does what an image does is the controller's
        // word, as for any code that it lets its process execute.
        unsafe { arch::enter(resume, handover) }
    }

    /// Makes the image there ready: 0 and the address of its entry, or why it can't take over.
    fn check(&self, image: u64) -> (i64, u64) {
        let mut table = MaybeUninit::<EntryTable>::uninit();
        let (to, size) = (table.as_mut_ptr() as u64, ENTRY_TABLE_SIZE);
        let from = image.wrapping_add(ENTRY_TABLE_OFFSET as u64);
        // SAFETY: into a buffer of this function's, which is as large.
        if unsafe { sys::copy(to, from, size as u64) } != size as i64 {
            return (EFAULT, 0);
        }
        // SAFETY: as many bytes were copied, and it is made of numbers.
        let EntryTable { magic, version, size, resume, handover, .. } =
            unsafe { table.assume_init() };
        if self.state.stream.version == 0
            || magic != IMAGE_MAGIC
            || version != IMAGE_VERSION
            || resume >= size
            || handover < HANDOVER_SIZE as u32
        {
            return (EINVAL, 0);
        }
        // SAFETY: the controller has named it. This also says whether all of it is there.
        let error = unsafe { sys::make_executable(image, size) };
        (error, image + u64::from(resume))
    }
}
