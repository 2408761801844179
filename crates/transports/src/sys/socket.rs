//! Unix sockets that keep message boundaries and carry descriptors.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use super::{check, check_len, Fd};

/// Who is at the other end of a Unix socket, as the kernel knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credentials {
    /// Process id in this namespace; 0 when it is not visible here.
    pub pid: u32,
    /// User id.
    pub uid: u32,
}

/// How many may wait at a listener until they are accepted: as many as Linux
/// allows unless it is told otherwise (`net.core.somaxconn`).
pub const BACKLOG: libc::c_int = 4096;

/// Listens under a name in the abstract namespace: no file, gone with the
/// process, invisible from other network namespaces.
///
/// # Errors
/// The system's.
pub fn abstract_listener(name: &str) -> io::Result<Fd> {
    let fd = seqpacket()?;
    let (address, len) = abstract_address(name)?;
    // SAFETY: `address` is valid for `len` bytes.
    check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) })?;
    // SAFETY: our own descriptor.
    check(unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) })?;
    Ok(fd)
}

/// Accepts a connection without blocking.
///
/// # Errors
/// The system's; `WouldBlock` when there is none.
pub fn accept(listener: &Fd) -> io::Result<Fd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no address is asked for; returns a new descriptor.
    Ok(unsafe {
        Fd::from_raw(check(libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags))?)
    })
}

/// Connects to an abstract name without blocking.
///
/// # Errors
/// The system's: nobody listens, or its queue is full.
pub fn connect_local(name: &str) -> io::Result<Fd> {
    let fd = seqpacket()?;
    let (address, len) = abstract_address(name)?;
    // SAFETY: `address` is valid for `len` bytes.
    check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), len) })?;
    Ok(fd)
}

/// Who is at the other end.
///
/// # Errors
/// The system's.
pub fn peer_credentials(fd: &Fd) -> io::Result<Credentials> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `credentials` has room for `len` bytes.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut len,
        )
    })?;
    Ok(Credentials { pid: u32::try_from(credentials.pid).unwrap_or(0), uid: credentials.uid })
}

/// Sends one message with descriptors, without blocking.
///
/// # Errors
/// The system's; `WouldBlock` when the other side does not read.
pub fn send_with_fds(socket: &Fd, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let fds_bytes = size_of_val(fds);
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = ControlBuffer([0; CONTROL_BYTES]);
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        assert!(fds.len() <= MAX_FDS, "at most {MAX_FDS} descriptors a message");
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: the macros compute lengths and addresses inside `control`, which has room for MAX_FDS descriptors.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(fds_bytes as u32) as _;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(fds_bytes as u32) as _;
            std::ptr::copy_nonoverlapping(fds.as_ptr().cast(), libc::CMSG_DATA(header), fds_bytes);
        }
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: everything `message` points to lives through the call.
    check_len(unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) })?;
    Ok(())
}

/// Receives one message and its descriptors, without blocking. Zero bytes mean
/// that the other side is gone.
///
/// # Errors
/// The system's; `WouldBlock` when there is none.
pub fn receive_with_fds(socket: &Fd, bytes: &mut [u8]) -> io::Result<(usize, Vec<Fd>)> {
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut control = ControlBuffer([0; CONTROL_BYTES]);
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = CONTROL_BYTES as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: everything `message` points to lives through the call.
    let len = check_len(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) })?;
    let mut fds = Vec::new();
    // SAFETY: the kernel filled `control`; the macros stay inside `msg_controllen`.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let nbytes = ((*header).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for idx in 0..nbytes / size_of::<RawFd>() {
                    fds.push(Fd::from_raw(data.add(idx).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Ok((len, fds))
}

fn seqpacket() -> io::Result<Fd> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: returns a new descriptor.
    Ok(unsafe { Fd::from_raw(check(libc::socket(libc::AF_UNIX, kind, 0))?) })
}

fn abstract_address(name: &str) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: an all-zero sockaddr_un is valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    if name.len() + 1 > address.sun_path.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, from) in address.sun_path[1..].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let len = std::mem::offset_of!(libc::sockaddr_un, sun_path) + 1 + name.len();
    Ok((address, len as libc::socklen_t))
}

/// Aligned as control messages must be.
#[repr(C, align(8))]
struct ControlBuffer([u8; CONTROL_BYTES]);

const MAX_FDS: usize = 4;
const CONTROL_BYTES: usize = 64;
