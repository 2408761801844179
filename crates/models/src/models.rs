//! What must hold, whatever order things come in.

pub mod binding;
pub mod counter;
pub mod doorbell;
pub mod fractions;
pub mod ring;
pub mod ticket;
pub mod wait;
