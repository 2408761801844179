//! A seeded simulation inside one process.
