-- Put the ends of lines on the shelf, and forget their jobs, or keep those whose pictures the lines name until the
-- batch's window ends and a result's time from there. Writes batch, tail, batch_done, batch_failed, finished, and what
-- purge writes. Repeated after a lost reply it changes nothing, since it names the lines that were there before.
-- ARGV: id, fence, lines before, marked text, completed, failed, output bytes, error bytes, input tokens, cached tokens,
--       output tokens, number of lines n, their n numbers, n times '1' (it failed) or '', n times 'forget', 'keep' or
--       '' and n times its job's id (or '')
-- Answers stale | same | {bytes in the tail}
local batch = run_batch(ARGV[1], ARGV[2])
if not batch then return 'stale' end
local n = tonumber(ARGV[12])
-- Fewer than there were: this server took over from one that it lagged behind, and the lines between are to run again.
if tonumber(batch.lines) < tonumber(ARGV[3]) then return 'stale' end
if batch.lines ~= ARGV[3] then return 'same' end
local tail = redis.call('APPEND', P .. 'tail:' .. batch.id, ARGV[4])
local counted = {'completed', 'failed', 'output_bytes', 'error_bytes', 'input_tokens', 'cached_tokens', 'output_tokens'}
for i, name in ipairs(counted) do
  redis.call('HSET', batch.key, name, whole(tonumber(batch[name]) + tonumber(ARGV[4 + i])))
end
redis.call('HSET', batch.key, 'lines', whole(tonumber(batch.lines) + n))
for i = 1, n do
  redis.call('SETBIT', P .. 'batch_done:' .. batch.id, ARGV[12 + i], 1)
  if ARGV[12 + n + i] ~= '' then redis.call('SETBIT', P .. 'batch_failed:' .. batch.id, ARGV[12 + i], 1) end
end
for i = 13 + 2 * n, 12 + 3 * n do
  local job = ARGV[i] ~= '' and load(ARGV[i + n])
  if job and TERMINAL[job.state] and ARGV[i] == 'forget' then
    purge(job)
  elseif job and ARGV[i] == 'keep' then
    redis.call('ZADD', P .. 'finished', 'XX', whole(math.max(NOW, tonumber(batch.expires_ms))), job.id)
  end
end
return {tail}
