-- Note which server keeps the ledger. Writes server.
-- A server that already ran when another one was noted took over from it, and may lack what that one accepted last; one
-- that was started since is the same ledger, read from its file.
-- Answers failover | same
local said = redis.call('INFO', 'server')
local run_id, uptime = string.match(said, 'run_id:(%x+)'), tonumber(string.match(said, 'uptime_in_seconds:(%d+)'))
local key = P .. 'server'
local seen = redis.call('HMGET', key, 'run_id', 'noted_ms')
redis.call('HSET', key, 'run_id', run_id, 'noted_ms', whole(NOW))
if not seen[1] or seen[1] == run_id or NOW - 1000 * uptime >= tonumber(seen[2]) then return 'same' end
redis.call('HINCRBY', key, 'failovers', 1)
return 'failover'
