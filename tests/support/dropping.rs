//! What a firewall does that answers nothing.

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

/// An address that drops whatever is sent to it, as a firewall does: nobody accepts, and there is no room for more to
/// wait.
pub struct Dropping {
    listener: TcpListener,
    _waiting: Vec<TcpStream>,
}

impl Dropping {
    pub fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a loopback port");
        // SAFETY: the descriptor is the listener's, which is open; to listen again changes how many may wait.
        let shortened = unsafe { libc::listen(listener.as_raw_fd(), 0) };
        assert_eq!(shortened, 0, "a queue of one");
        let address = listener.local_addr().expect("its address");
        let wait = Duration::from_millis(200);
        // Until one is not let in any more.
        let waiting: Vec<_> = std::iter::from_fn(|| TcpStream::connect_timeout(&address, wait).ok()).take(8).collect();
        assert!(waiting.len() < 8, "the queue never fills");
        Self { listener, _waiting: waiting }
    }

    /// `127.0.0.1:PORT`
    pub fn authority(&self) -> String {
        self.listener.local_addr().expect("its address").to_string()
    }
}
