# All that the control machine may do in Vault: ask for secret ids of the AppRoles of the app `inbox`, and only for
# response-wrapped ones. Without min_wrapping_ttl the same right would hand out bare secret ids as well. The last path is
# for an app with a rotate identity. docs/vault.md says how to use this.

path "auth/approle/role/forge-inbox-app/secret-id" {
  capabilities     = ["create", "update"]
  min_wrapping_ttl = "60s"
  max_wrapping_ttl = "300s"
}

path "auth/approle/role/forge-inbox-migrate/secret-id" {
  capabilities     = ["create", "update"]
  min_wrapping_ttl = "60s"
  max_wrapping_ttl = "300s"
}

path "auth/approle/role/forge-inbox-rotate/secret-id" {
  capabilities     = ["create", "update"]
  min_wrapping_ttl = "60s"
  max_wrapping_ttl = "300s"
}
