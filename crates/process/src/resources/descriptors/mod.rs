//! Open file descriptions: one file a kind, listed in one registry.
