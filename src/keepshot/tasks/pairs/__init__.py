"""Instructions with answers made by code: general data to mix into tuning, or to tune on."""
