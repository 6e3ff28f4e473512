"""The ops under names and signatures of other libraries. Nothing is changed in these at import: a call asks for it."""
