//! The planner by example.
