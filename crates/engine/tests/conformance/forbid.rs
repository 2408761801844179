//! Rights that a peer process gives up for good, so that it is treated as some machines treat all.

use std::io;

use crate::ask::Forbidden;

/// Gives up a right, in this thread and those that it starts from now on.
///
/// # Errors
/// The system's.
pub(crate) fn forbid(what: Forbidden) -> io::Result<()> {
    match what {
        Forbidden::Write => filter(&[libc::SYS_process_vm_writev]),
        Forbidden::ReadAndWrite => filter(&[libc::SYS_process_vm_readv, libc::SYS_process_vm_writev]),
        Forbidden::Accept => filter(&[libc::SYS_accept4]),
        Forbidden::Trace => drop_capability(CAP_SYS_PTRACE),
    }
}

/// From now on these system calls fail with EPERM.
fn filter(calls: &[libc::c_long]) -> io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    // The number of the call is the first word that a filter sees.
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for (idx, call) in calls.iter().enumerate() {
        let to_the_refusal = (calls.len() - idx) as u8;
        let compare = statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, *call as u32);
        program.push(libc::sock_filter { jt: to_the_refusal, ..compare });
    }
    program.push(statement(libc::BPF_RET, libc::SECCOMP_RET_ALLOW));
    program.push(statement(libc::BPF_RET, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32));
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program lives through the call, which copies it.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
        check(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program).into())
    }
}

/// Who lacks it may not trace those who have it, although they run as the same user.
fn drop_capability(capability: u32) -> io::Result<()> {
    let header = [CAPABILITY_VERSION_3, 0];
    // Effective, permitted and inheritable, the low halves first.
    let mut sets = [[0_u32; 3]; 2];
    // SAFETY: both have the layout that this version asks for.
    unsafe {
        check(libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()))?;
        sets[0].iter_mut().for_each(|set| *set &= !(1 << capability));
        check(libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()))
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

const CAP_SYS_PTRACE: u32 = 19;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
