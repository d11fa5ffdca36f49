-- All lines have ended: first say so (finalizing), then, with the tail empty, end the batch and show its files.
-- Writes batch, batches:*, users, file, files, expiring, owners, parts.
-- ARGV: id, fence, how far (finalizing | end), output file id, its name, error file id, its name,
--       seconds that the files live, keep_ms of the record, then field, value, ... of what else is to be said at the end
-- Answers stale | open (lines or a tail are left) | the status
local batch = load_batch(ARGV[1])
if not batch or batch.fence ~= ARGV[2] then return 'stale' end
if BATCH_TERMINAL[batch.status] then return batch.status end
if batch.lines ~= batch.total then return 'open' end
if ARGV[3] == 'finalizing' then
  if batch.status == 'in_progress' then set_status(batch, 'finalizing') end
  return batch.status
end
if redis.call('EXISTS', P .. 'tail:' .. batch.id) == 1 then return 'open' end

local function show(kind, file_id, name, bytes)
  if bytes == '0' then return end
  show_file(file_id, {tenant = batch.tenant, filename = name, purpose = 'batch_output', bytes = bytes,
    shelf = batch.id, kind = kind, idem = '', body_hash = ''}, ARGV[8])
  redis.call('HSET', batch.key, kind .. '_file_id', file_id)
end
show('output', ARGV[4], ARGV[5], batch.output_bytes)
show('error', ARGV[6], ARGV[7], batch.error_bytes)
for i = 10, #ARGV, 2 do redis.call('HSET', batch.key, ARGV[i], ARGV[i + 1]) end
disown(batch.id, batch.id)
redis.call('DEL', P .. 'batch_done:' .. batch.id, P .. 'batch_only:' .. batch.id)
local verdict = (batch.overdue or '') ~= '' and 'expired' or 'completed'
end_batch(batch, batch.status == 'cancelling' and 'cancelled' or verdict, ARGV[9])
return batch.status
