//! The release rule: which held output may leave.
