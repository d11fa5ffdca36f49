-- Begin a file that is on its way; without an end it is forgotten after ttl_ms. Writes file, expiring, owners.
-- ARGV: id, tenant, filename, purpose, ttl_ms
-- Answers ok
open_file(ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5])
return 'ok'
