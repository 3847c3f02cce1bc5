//! The planner against a small simulated fleet: by example, and at random.

mod examples;
mod random;
mod sim;
