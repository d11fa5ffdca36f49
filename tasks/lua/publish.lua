-- Append events to the log of a running job, once for each token. Writes events and job (next_seq, published, progress).
-- ARGV: id, fence, token, token of what this fence published before ('' = nothing), max_events, progress JSON ('' = as it
--   was), then the events as JSON objects
-- Answers ok | cancel | stale | full
local job = load(ARGV[1])
if not job or not held(job, ARGV[2]) then return 'stale' end

local KEPT = 16
local token, tokens = ARGV[3], tokens_of(job)
if not tokens[token] then
  if lost_words(job, ARGV[4]) then return 'stale' end
  if tonumber(job.next_seq) + #ARGV - 6 > tonumber(ARGV[5]) then return 'full' end
  for i = 7, #ARGV do
    emit(job, ARGV[i])
    tell_of(job, ARGV[i])
  end
  tokens[#tokens + 1] = token
  if #tokens > KEPT then table.remove(tokens, 1) end
  redis.call('HSET', job.key, 'published', table.concat(tokens, ' '))
  if ARGV[6] ~= '' then redis.call('HSET', job.key, 'progress', ARGV[6]) end
end
if job.state == 'cancelling' or overdue(job) then return 'cancel' end
return 'ok'
