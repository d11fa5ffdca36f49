-- Append events to the log of a running job, once for each token. Writes events and job (next_seq, published, progress).
-- ARGV: id, fence, token, max_events, progress JSON ('' = as it was), then the events as JSON objects
-- Answers ok | cancel | stale | full
local job = load(ARGV[1])
if not job or not held(job, ARGV[2]) then return 'stale' end

-- The last few tokens are kept, not only one: a double that the network held back may arrive after the next call.
local KEPT = 16
local token = ARGV[3]
local tokens = {}
for seen in string.gmatch(redis.call('HGET', job.key, 'published') or '', '%S+') do tokens[#tokens + 1] = seen end
local known = false
for _, seen in ipairs(tokens) do known = known or seen == token end

if not known then
  if tonumber(job.next_seq) + #ARGV - 5 > tonumber(ARGV[4]) then return 'full' end
  for i = 6, #ARGV do
    emit(job, ARGV[i])
    tell_of(job, ARGV[i])
  end
  tokens[#tokens + 1] = token
  if #tokens > KEPT then table.remove(tokens, 1) end
  redis.call('HSET', job.key, 'published', table.concat(tokens, ' '))
  if ARGV[5] ~= '' then redis.call('HSET', job.key, 'progress', ARGV[5]) end
end
if job.state == 'cancelling' or overdue(job) then return 'cancel' end
return 'ok'
