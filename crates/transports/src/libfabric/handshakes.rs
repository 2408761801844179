//! Connections to an endpoint that have not said yet whose they are.
//!
//! A provider over sockets accepts them by itself, within calls that read its queue, and keeps each beside the endpoint
//! until its first message. The one for which this is here (see [`super::Quirks`]) forgets none of them when the endpoint
//! is closed, and what they say later is looked up in memory that is free. So they are ended before.

use std::collections::HashSet;
use std::mem::ManuallyDrop;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{FromRawFd, RawFd};

/// The connections that an endpoint has accepted and that were ended: descriptor
/// and other end, for descriptors are used again.
#[derive(Default)]
pub(super) struct Ended(HashSet<(RawFd, SocketAddr)>);

impl Ended {
    /// Ends every connection to the endpoint of that name which is not; true when
    /// there was one. The queue must be read then: the provider lets go of what
    /// was ended, and may accept more.
    pub(super) fn end_more(&mut self, name: &[u8]) -> bool {
        let Some(at) = address_of(name) else { return false };
        let before = self.0.len();
        for fd in descriptors() {
            // SAFETY: only looked at, and never closed; whatever else the descriptor may be refuses these calls.
            let socket = ManuallyDrop::new(unsafe { TcpStream::from_raw_fd(fd) });
            let is_to =
                |local: SocketAddr| local.port() == at.port() && (at.ip().is_unspecified() || at.ip() == local.ip());
            if !socket.local_addr().is_ok_and(is_to) {
                continue;
            }
            // The listener has no other end. What has one is the provider's, which works only while we have the NIC: nobody
            // closes it meanwhile.
            if socket.peer_addr().is_ok_and(|peer| self.0.insert((fd, peer))) {
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
        self.0.len() > before
    }
}

/// Looks at most, should somebody call faster than we hang up.
pub(super) const MAX_LOOKS: usize = 1000;

/// Every descriptor of this process.
fn descriptors() -> Vec<RawFd> {
    let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The address in a `sockaddr_in` or `sockaddr_in6`.
fn address_of(name: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(*name.first_chunk()?);
    let port = u16::from_be_bytes(*name.get(2..)?.first_chunk()?);
    let ip: IpAddr = match libc::c_int::from(family) {
        libc::AF_INET => Ipv4Addr::from(*name.get(4..)?.first_chunk::<4>()?).into(),
        libc::AF_INET6 => Ipv6Addr::from(*name.get(8..)?.first_chunk::<16>()?).into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;

    use super::*;

    fn name_of(address: SocketAddr) -> Vec<u8> {
        let SocketAddr::V4(address) = address else { unreachable!("it was bound to one of version 4") };
        let mut name = (libc::AF_INET as u16).to_ne_bytes().to_vec();
        name.extend(address.port().to_be_bytes());
        name.extend(address.ip().octets());
        name.resize(16, 0);
        name
    }

    #[test]
    fn connections_to_one_endpoint_end_and_no_others() {
        let listen = || TcpListener::bind("127.0.0.1:0").expect("a listener");
        let (ours, other) = (listen(), listen());
        let connect = |listener: &TcpListener| {
            let calls = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
            (calls, listener.accept().expect("a call").0)
        };
        let ((mut caller, _accepted), (other_caller, _other_accepted)) = (connect(&ours), connect(&other));
        let name = name_of(ours.local_addr().expect("an address"));
        let mut ended = Ended::default();
        assert!(ended.end_more(&name));
        assert!(!ended.end_more(&name), "each is ended once");
        assert_eq!(caller.read(&mut [0; 1]).expect("the end"), 0);
        other_caller.set_nonblocking(true).expect("a socket");
        let nothing = other_caller.peek(&mut [0; 1]).expect_err("nothing was said, and it stands");
        assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
        let (_late, _accepted_late) = connect(&ours);
        assert!(ended.end_more(&name));
    }

    #[test]
    fn a_name_that_is_no_address_ends_nothing() {
        for name in [&[][..], &[2], &[2, 0, 1], &[0xff; 192]] {
            assert!(!Ended::default().end_more(name));
        }
    }
}
