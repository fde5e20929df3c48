"""What to say where a Ray cluster may be asking for a token."""

TOKEN_ADVICE = (
    "RAY_AUTH_MODE must be here what it is there: disabled, or token with the cluster's token in "
    "RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token (`ray get-auth-token` there)"
)
"""Without the token that a cluster asks for it looks as if nobody were there."""
