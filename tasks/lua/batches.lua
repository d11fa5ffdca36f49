-- Shared by the scripts of batches; stands behind records.lua and shelf.lua.
--   batch:<id>         hash    the record (see batch_create and tasks/batches.py); an absent value is ''
--   batches:<tenant>   zset    id -> seq
--   batches:open       zset    id -> ms until which a runner holds it; over = whoever comes first may take it
--   batches:ended      zset    id -> ms at which the record is forgotten
--   batch_done:<id>    string  a bit a line (counted from 0): its end is on the shelf
--   batch_failed:<id>  string  a bit a line: it ended in the error file
--   batch_only:<id>    string  of a retry: a bit a line of the input that it runs again; others are none of its lines
--   tail:<id>          string  marked lines behind the last part of the shelf, which bears the batch's id
-- A line's end is written once: its text, its bit, the counts and the deletion of its job are one script.

local BATCH_TERMINAL = {completed = true, failed = true, expired = true, cancelled = true}

local function load_batch(id, tenant)
  local batch = {}
  local flat = redis.call('HGETALL', P .. 'batch:' .. id)
  for i = 1, #flat, 2 do batch[flat[i]] = flat[i + 1] end
  if not batch.status or (tenant and tenant ~= '' and batch.tenant ~= tenant) then return nil end
  batch.id, batch.key = id, P .. 'batch:' .. id
  return batch
end

-- The batch, if this fence is its runner's and it has not ended.
local function run_batch(id, fence)
  local batch = load_batch(id)
  if batch and batch.fence == fence and not BATCH_TERMINAL[batch.status] then return batch end
  return nil
end

local function set_status(batch, status)
  batch.status = status
  redis.call('HSET', batch.key, 'status', status, status .. '_ms', whole(NOW))
end

-- The only way into a terminal status, and so the one event that a batch sends.
local function end_batch(batch, status, keep_ms)
  set_status(batch, status)
  local webhook = wants(batch.webhook_events or '', status) and batch.webhook or ''
  send_event({tenant = batch.tenant, subject = batch.id, type = 'batch.' .. status, key = 'end', tries = '',
    data = '{"id":"' .. batch.id .. '","status":"' .. status .. '","seq":0}'}, webhook)
  redis.call('ZREM', P .. 'batches:open', batch.id)
  redis.call('ZADD', P .. 'batches:ended', whole(NOW + tonumber(keep_ms)), batch.id)
  redis.call('SREM', P .. 'users:' .. batch.input_file_id, batch.id)
end
