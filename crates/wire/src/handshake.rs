//! How two engines meet on a TCP connection.
//!
//! ```text
//! caller                                  listener
//! Call: magic, versions, nonce  ───────►
//!                               ◄───────  Answer: magic, verdict, version, nonce, proof
//! sealed Hello                  ───────►
//!                               ◄───────  sealed Welcome
//! ```
//!
//! `Call` and `Answer` have fixed lengths and nothing in them is interpreted
//! but numbers. Both sides prove that they hold the cluster secret before
//! anything else is parsed: the listener's proof and every sealed body are
//! HMAC-SHA256 over a label for the direction, the versions called with, the
//! version agreed and both nonces, so that nothing can be replayed or reflected
//! and no version talked down. Without a secret the key is
//! empty, and the listener is bound to loopback unless the user asked
//! otherwise.
//!
//! ```text
//! Call, 48 bytes               Answer, 80 bytes              sealed body
//! 0  4  magic "ANYF"           0  4  magic "ANYF"            0  4  length of body
//! 4  2  newest version         4  2  version agreed          4  32 proof
//! 6  2  oldest version         6  2  oldest version          36 .. body, postcard
//! 8  1  1 if a secret is set   8  1  verdict
//! 9  7  zero                   9  7  zero
//! 16 32 nonce                  16 32 nonce
//!                              48 32 proof
//! ```

use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use crate::address::{Address, EngineId};
use crate::codec::{decode_whole, encode_whole};
use crate::version::{agree, OLDEST_VERSION, VERSION};
use crate::WireError;

/// Length of [`Call`].
pub const CALL_BYTES: usize = 48;
/// Length of [`Answer`].
pub const ANSWER_BYTES: usize = 80;
/// Length of a sealed body's header.
pub const SEAL_BYTES: usize = 36;
/// Longest sealed body without its header.
pub const MAX_BODY: usize = 4096;

/// The caller's first bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Newest and oldest wire version spoken.
    pub versions: (u16, u16),
    /// Whether a secret is set.
    pub secret: bool,
    /// Random, new for every connection.
    pub nonce: [u8; 32],
}

impl Call {
    /// A call of this build.
    pub const fn new(secret: bool, nonce: [u8; 32]) -> Self {
        Self { versions: (VERSION, OLDEST_VERSION), secret, nonce }
    }

    /// The 48 bytes.
    pub fn encode(&self) -> [u8; CALL_BYTES] {
        let mut bytes = [0; CALL_BYTES];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4..6].copy_from_slice(&self.versions.0.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.versions.1.to_le_bytes());
        bytes[8] = u8::from(self.secret);
        bytes[16..].copy_from_slice(&self.nonce);
        bytes
    }

    /// Reads the 48 bytes.
    ///
    /// # Errors
    /// [`WireError::Magic`]: something else talks to this port.
    pub fn decode(bytes: &[u8; CALL_BYTES]) -> Result<Self, WireError> {
        if !bytes.starts_with(MAGIC) {
            return Err(WireError::magic("a call of an engine", "ANYF", bytes));
        }
        let mut nonce = [0; 32];
        nonce.copy_from_slice(&bytes[16..]);
        Ok(Self {
            versions: (u16::from_le_bytes([bytes[4], bytes[5]]), u16::from_le_bytes([bytes[6], bytes[7]])),
            secret: bytes[8] != 0,
            nonce,
        })
    }

    /// The newest version that this build and the caller speak.
    ///
    /// # Errors
    /// [`WireError::Version`] naming both sides' versions.
    pub fn agree(&self) -> Result<u16, WireError> {
        agree("the peer", self.versions.0, self.versions.1)
    }
}

/// What the listener makes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    /// Go on.
    Ok = 0,
    /// No version in common.
    Version = 1,
    /// One side has a secret and the other has none.
    Secret = 2,
    /// Too many connections or descriptors.
    Busy = 3,
}

/// The listener's first bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Whether to go on.
    pub verdict: Verdict,
    /// The version agreed, or the newest spoken when there is none.
    pub version: u16,
    /// The oldest version spoken.
    pub oldest: u16,
    /// Random, new for every connection.
    pub nonce: [u8; 32],
    /// That the listener holds the secret.
    pub proof: [u8; 32],
}

impl Answer {
    /// The 80 bytes.
    pub fn encode(&self) -> [u8; ANSWER_BYTES] {
        let mut bytes = [0; ANSWER_BYTES];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4..6].copy_from_slice(&self.version.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.oldest.to_le_bytes());
        bytes[8] = self.verdict as u8;
        bytes[16..48].copy_from_slice(&self.nonce);
        bytes[48..].copy_from_slice(&self.proof);
        bytes
    }

    /// Reads the 80 bytes.
    ///
    /// # Errors
    /// [`WireError::Magic`]: something else listens there;
    /// [`WireError::Malformed`]: an unknown verdict.
    pub fn decode(bytes: &[u8; ANSWER_BYTES]) -> Result<Self, WireError> {
        if !bytes.starts_with(MAGIC) {
            return Err(WireError::magic("an engine's answer", "ANYF", bytes));
        }
        let verdict = match bytes[8] {
            0 => Verdict::Ok,
            1 => Verdict::Version,
            2 => Verdict::Secret,
            3 => Verdict::Busy,
            verdict => return Err(WireError::malformed("answer", format!("unknown verdict {verdict}"))),
        };
        let (mut nonce, mut proof) = ([0; 32], [0; 32]);
        nonce.copy_from_slice(&bytes[16..48]);
        proof.copy_from_slice(&bytes[48..]);
        Ok(Self {
            verdict,
            version: u16::from_le_bytes([bytes[4], bytes[5]]),
            oldest: u16::from_le_bytes([bytes[6], bytes[7]]),
            nonce,
            proof,
        })
    }

    /// The version agreed, which the caller must check: a listener could name
    /// one that was never offered.
    ///
    /// # Errors
    /// [`WireError::Version`] naming both sides' versions.
    pub fn agreed(&self) -> Result<u16, WireError> {
        if self.verdict != Verdict::Version && (OLDEST_VERSION..=VERSION).contains(&self.version) {
            return Ok(self.version);
        }
        Err(WireError::Version { what: "the peer", given: self.version, oldest: OLDEST_VERSION, newest: VERSION })
    }
}

/// Who speaks, for the proofs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Who connected.
    Caller,
    /// Who accepted.
    Listener,
}

/// The secret and what both sides said first: seals and opens what follows.
#[derive(Clone)]
pub struct Seal {
    secret: Vec<u8>,
    transcript: [u8; TRANSCRIPT],
}

impl Seal {
    /// For one connection.
    pub fn new(secret: &[u8], call: &Call, version: u16, answer_nonce: &[u8; 32]) -> Self {
        let mut transcript = [0; TRANSCRIPT];
        transcript[..2].copy_from_slice(&call.versions.0.to_le_bytes());
        transcript[2..4].copy_from_slice(&call.versions.1.to_le_bytes());
        transcript[4..6].copy_from_slice(&version.to_le_bytes());
        transcript[6..38].copy_from_slice(&call.nonce);
        transcript[38..].copy_from_slice(answer_nonce);
        Self { secret: secret.to_vec(), transcript }
    }

    /// The listener's proof, for its [`Answer`].
    pub fn proof(&self) -> [u8; 32] {
        self.mac(b"answer", &[]).finalize().into_bytes().into()
    }

    /// Whether the listener's proof is right; takes the same time for every
    /// wrong one.
    pub fn check_proof(&self, proof: &[u8; 32]) -> bool {
        self.mac(b"answer", &[]).verify_slice(proof).is_ok()
    }

    /// Seals a body.
    pub fn seal<T: Serialize>(&self, side: Side, body: &T) -> Vec<u8> {
        let body = encode_whole(body);
        let proof = self.mac(label(side), &body).finalize().into_bytes();
        let mut bytes = Vec::with_capacity(SEAL_BYTES + body.len());
        bytes.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend_from_slice(&proof);
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Length of the body that follows a seal's header.
    ///
    /// # Errors
    /// [`WireError::Malformed`] when it is longer than [`MAX_BODY`].
    pub fn body_bytes(header: &[u8; SEAL_BYTES]) -> Result<usize, WireError> {
        let nbytes = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
        if nbytes > MAX_BODY {
            return Err(WireError::malformed("hello", format!("{nbytes} bytes, at most {MAX_BODY}")));
        }
        Ok(nbytes)
    }

    /// Opens a sealed body: `None` when the proof is wrong, and then not one
    /// byte of the body has been parsed.
    ///
    /// # Errors
    /// [`WireError::Malformed`]: proven but malformed.
    pub fn open<T: for<'a> Deserialize<'a>>(
        &self,
        side: Side,
        header: &[u8; SEAL_BYTES],
        body: &[u8],
    ) -> Result<Option<T>, WireError> {
        if self.mac(label(side), body).verify_slice(&header[4..]).is_err() {
            return Ok(None);
        }
        decode_whole("hello", body, MAX_BODY).map(Some)
    }

    fn mac(&self, label: &[u8], body: &[u8]) -> Hmac<Sha256> {
        // HMAC takes keys of any length; the error cannot occur.
        let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(&self.secret)
            .unwrap_or_else(|_| <Hmac<Sha256> as Mac>::new(&Default::default()));
        mac.update(label);
        mac.update(&self.transcript);
        mac.update(body);
        mac
    }
}

/// What a connection is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// The control connection of two engines.
    Session {
        /// Which incarnation the caller expects to find.
        callee: EngineId,
        /// The session is resumed after its connection broke.
        resume: Option<Resume>,
    },
    /// A further stream of an existing session.
    Lane {
        /// Given out in the session's [`Welcome`].
        token: [u8; 16],
        /// Which stream: 1 and up; 0 is the control connection itself.
        lane_idx: u8,
    },
}

/// Where a broken session goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// Token of the session.
    pub token: [u8; 16],
    /// Control messages that had arrived in order.
    pub received: u64,
}

/// Which machine an engine runs on, for the question whether two share one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: [u8; 16],
    /// Process id in its own namespace, for people to read.
    pub pid: u32,
    /// Host name, for people to read.
    pub name: String,
}

/// The caller introduces itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Its address.
    pub address: Address,
    /// What this connection is for.
    pub purpose: Purpose,
    /// Its machine.
    pub host: Host,
    /// The transports it may use, in the words of the API.
    pub transports: Vec<String>,
    /// Largest message it takes.
    pub max_message_bytes: u32,
}

/// The listener's answer to a [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Welcome {
    /// The session or stream stands.
    Accepted(Box<Accepted>),
    /// It does not.
    Rejected(Rejection),
}

/// A session as the listener sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// Its address.
    pub address: Address,
    /// Its machine.
    pub host: Host,
    /// The transports it may use.
    pub transports: Vec<String>,
    /// Largest message it takes.
    pub max_message_bytes: u32,
    /// Binds further streams and the Unix socket to this session.
    pub token: [u8; 16],
    /// Control messages that had arrived in order, of a resumed session.
    pub received: u64,
}

/// Why there is no session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rejection {
    /// Another incarnation lives here: the one expected is dead.
    OtherIncarnation,
    /// The caller's incarnation was given up here: it is fenced for good.
    Fenced,
    /// The listener is calling the caller at this moment, and its call wins.
    Crossed,
    /// No such session.
    NoSession,
    /// No more peers, descriptors or memory.
    Busy,
    /// The listener is closing.
    Closing,
}

const fn label(side: Side) -> &'static [u8] {
    match side {
        Side::Caller => b"hello",
        Side::Listener => b"welcome",
    }
}

const MAGIC: &[u8; 4] = b"ANYF";
// Versions of the call, version agreed, nonces.
const TRANSCRIPT: usize = 2 + 2 + 2 + 32 + 32;
