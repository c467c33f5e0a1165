"""Many runs: every λ at every pruning ratio with several seeds."""
