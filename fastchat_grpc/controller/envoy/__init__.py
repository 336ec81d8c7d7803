"""What a controller offers to the Envoy of a gateway: ext_authz (picks), EDS (endpoints), ALS (what became of both)."""
