-- Accept a batch once. Writes batch, batches, batches:open, users, owners, seq, idem, for a retry batch_only, and what
-- open_file writes where its runner has to fetch the input first.
-- ARGV: id, tenant, idem digest ('' = none), idem ttl ms ('' = as long as the batch), look for an earlier one ('1' | ''),
--       body_hash, input file ('' = the parent's), parent ('' = none), seconds of the window, webhook ('' = none),
--       name of the input file that is to be fetched ('' = it is there), ms until it is given up,
--       then field, value, ...
-- Answers {'new' | 'replay', id} | {'reuse'} | {'no_file'} | {'no_parent'} | {'parent', its status} | {'nothing'} |
--         {'no_endpoint'} (the webhook names none of this tenant)
local id, tenant, idem, body_hash = ARGV[1], ARGV[2], ARGV[3], ARGV[6]
local input, parent_id, webhook = ARGV[7], ARGV[8], ARGV[10]

local function verdict(existing)
  local before = load_batch(existing, tenant)
  if not before then return nil end
  if before.body_hash == body_hash then return {'replay', existing} end
  return {'reuse'}
end

local answer = verdict(id)
if not answer and idem ~= '' and ARGV[5] ~= '' then
  local first = redis.call('GET', P .. 'idem:' .. idem)
  answer = first and verdict(first)
end
if answer then return answer end
if string.sub(webhook, 1, 3) == 'we_' and redis.call('HGET', P .. 'endpoint:' .. webhook, 'tenant') ~= tenant then
  return {'no_endpoint'}
end

if parent_id ~= '' then
  local parent = load_batch(parent_id, tenant)
  if not parent then return {'no_parent'} end
  if not BATCH_TERMINAL[parent.status] then return {'parent', parent.status} end
  if redis.call('BITCOUNT', P .. 'batch_failed:' .. parent_id) == 0 then return {'nothing'} end
  input = parent.input_file_id
  redis.call('SET', P .. 'batch_only:' .. id, redis.call('GET', P .. 'batch_failed:' .. parent_id))
end
if ARGV[11] ~= '' then open_file(input, tenant, ARGV[11], 'batch', ARGV[12]) end
local file = file_fields(input)
local status = ARGV[11] ~= '' and 'uploading' or 'processed'
if not file or file.tenant ~= tenant or file.status ~= status or file.purpose ~= 'batch' then
  redis.call('DEL', P .. 'batch_only:' .. id)
  return {'no_file'}
end

local key, seq = P .. 'batch:' .. id, whole(redis.call('INCR', P .. 'seq'))
redis.call('HSET', key, 'tenant', tenant, 'status', 'validating', 'input_file_id', input, 'input_shelf', file.shelf,
  'retry_of', parent_id, 'created_ms', whole(NOW), 'expires_ms', whole(NOW + 1000 * tonumber(ARGV[9])), 'seq', seq,
  'fence', '0', 'total', '0', 'completed', '0', 'failed', '0', 'lines', '0', 'parts', '0', 'output_bytes', '0',
  'error_bytes', '0', 'input_tokens', '0', 'cached_tokens', '0', 'output_tokens', '0', 'body_hash', body_hash, 'idem', '',
  'webhook', webhook)
for i = 13, #ARGV, 2 do redis.call('HSET', key, ARGV[i], ARGV[i + 1]) end
redis.call('ZADD', P .. 'batches:' .. tenant, seq, id)
redis.call('ZADD', P .. 'batches:open', whole(NOW), id)
redis.call('SADD', P .. 'users:' .. input, id)
redis.call('SADD', P .. 'owners:' .. id, id)
if idem ~= '' then
  if ARGV[4] ~= '' then
    redis.call('SET', P .. 'idem:' .. idem, id, 'PX', ARGV[4])
  else
    redis.call('SET', P .. 'idem:' .. idem, id)
    redis.call('HSET', key, 'idem', idem)
  end
end
return {'new', id}
