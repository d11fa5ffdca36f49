-- Shared by every ledger script, behind records.lua: events for webhooks, and where their deliveries stand.
--
--   endpoint:<we>         hash    an endpoint: tenant, name, url, events (types, a space between them), secret,
--                                 old_secret, old_until_ms, created_ms, updated_ms
--   endpoints:<tenant>    zset    we -> created ms
--   hook_secret:<tenant>  hash    secret, old_secret, old_until_ms: signs for urls that jobs bring along
--   delivery:<whd>        hash    one event for one receiver; an absent value is ''
--   deliveries:<tenant>   zset    whd -> number, all deliveries
--   delivery_number       string  counter that numbers deliveries by age
--   forget_deliveries     zset    whd -> ms at which the record is deleted
--   receiver:<r>          hash    failures (in a row), failing_since_ms, open_until_ms, disabled (why; '' = it is not)
--   queue:<r>             zset    whd -> ms from which it may be sent
--   sending:<r>           zset    whd -> ms at which the lease of who sends it is over
--   outbox                zset    r -> ms from which there is something to do for it
--   sender:<token>        string  "<fence> <whd>", what a take gave; dies after ten minutes
-- A receiver r is an endpoint's id, `url_` and a digest of tenant and url, or an endpoint's id and `:test`.

local HOOK_KEEP_MS = 7 * 86400 * 1000
local HOOK_IN_FLIGHT = 2
-- Attempts where the whole schedule is too much: of what happens on the way the next event tells more.
local HOOK_TRIES = {started = 3, output = 3, progress = 1}
local HOOK_PROGRESS_GAP_MS = 1000

local function wants(list, word)
  return string.find(' ' .. list .. ' ', ' ' .. word .. ' ', 1, true) ~= nil
end

-- Say when there is next something to do for a receiver: the first of its queue, or the end of a lease.
local function rescore(receiver)
  local health = redis.call('HMGET', P .. 'receiver:' .. receiver, 'open_until_ms', 'disabled')
  local head = redis.call('ZRANGE', P .. 'queue:' .. receiver, 0, 0, 'WITHSCORES')
  local lease = redis.call('ZRANGE', P .. 'sending:' .. receiver, 0, 0, 'WITHSCORES')
  local at = number(lease[2])
  local free = redis.call('ZCARD', P .. 'sending:' .. receiver) < HOOK_IN_FLIGHT
  if head[2] and free and (health[2] or '') == '' then
    -- Never before now, so that who has waited longest does not always come first.
    local due = math.max(tonumber(head[2]), NOW, number(health[1]) or 0)
    if not at or due < at then at = due end
  end
  if at then redis.call('ZADD', P .. 'outbox', whole(at), receiver) else redis.call('ZREM', P .. 'outbox', receiver) end
end

local function queue_delivery(id, receiver, due)
  redis.call('ZADD', P .. 'queue:' .. receiver, whole(due), id)
  rescore(receiver)
  redis.call('PUBLISH', P .. 'hooks', '')
end

local function forget_delivery(id)
  local seen = redis.call('HMGET', P .. 'delivery:' .. id, 'tenant', 'receiver')
  redis.call('ZREM', P .. 'forget_deliveries', id)
  if not seen[1] then return end
  redis.call('UNLINK', P .. 'delivery:' .. id)
  redis.call('ZREM', P .. 'deliveries:' .. seen[1], id)
  redis.call('ZREM', P .. 'queue:' .. seen[2], id)
  redis.call('ZREM', P .. 'sending:' .. seen[2], id)
  rescore(seen[2])
end

local function delivery_id(event, receiver)
  return 'whd_' .. string.sub(redis.sha1hex((event.slot or event.id) .. ' ' .. receiver), 1, 32)
end

local function event_body(event, data)
  return '{"id":"' .. event.id .. '","object":"event","type":"' .. event.type .. '","created_at":' ..
    whole(math.floor(NOW / 1000)) .. ',"data":' .. data .. '}'
end

-- One event for one receiver, once. `event`: tenant, subject (whose it is), type, id, body, due, tries ('' = those of
-- the schedule). With `event.slot` it takes the place of an earlier one of this slot that is not delivered yet.
-- Answers whether there is a new delivery.
local function deliver(event, receiver, endpoint, url)
  local id = delivery_id(event, receiver)
  local key = P .. 'delivery:' .. id
  if redis.call('EXISTS', key) == 1 then
    if event.slot then redis.call('HSET', key, 'event', event.id, 'body', event.body) end
    return false
  end
  local n = redis.call('INCR', P .. 'delivery_number')
  redis.call('HSET', key, 'tenant', event.tenant, 'receiver', receiver, 'endpoint', endpoint, 'url', url,
    'subject', event.subject, 'type', event.type, 'event', event.id, 'body', event.body, 'tries', event.tries,
    'slot', event.slot or '', 'state', 'pending', 'attempts', '0', 'fence', '0', 'created_ms', whole(NOW))
  redis.call('ZADD', P .. 'deliveries:' .. event.tenant, n, id)
  redis.call('ZADD', P .. 'forget_deliveries', whole(NOW + HOOK_KEEP_MS), id)
  queue_delivery(id, receiver, event.due or NOW)
  return true
end

local function url_receiver(tenant, url)
  return 'url_' .. string.sub(redis.sha1hex(tenant .. '\n' .. url), 1, 32)
end

-- The webhook that a job brings along: an endpoint of its tenant, as it is now, or a url.
local function deliver_to(event, webhook)
  if webhook == '' then return false end
  if string.sub(webhook, 1, 3) ~= 'we_' then
    return deliver(event, url_receiver(event.tenant, webhook), '', webhook)
  end
  if redis.call('HGET', P .. 'endpoint:' .. webhook, 'tenant') ~= event.tenant then return false end
  return deliver(event, webhook, webhook, '')
end

-- An event for `webhook` ('' = none) and for every endpoint of the tenant that asked for its type.
-- `event`: tenant, subject, type, key (what makes it unique), data (JSON), tries, due, slot
-- Answers whether there are new deliveries.
local function send_event(event, webhook)
  -- With the type: a server that lagged behind when it took over gives numbers of a job's log anew, and a receiver that
  -- knows the id would ignore the event.
  event.id = 'evt_' .. string.sub(redis.sha1hex(event.subject .. ' ' .. event.type .. ' ' .. event.key), 1, 32)
  event.body = event_body(event, event.data)
  local fresh = deliver_to(event, webhook)
  for _, endpoint in ipairs(redis.call('ZRANGE', P .. 'endpoints:' .. event.tenant, 0, -1)) do
    local types = redis.call('HGET', P .. 'endpoint:' .. endpoint, 'events') or ''
    if wants(types, event.type) then fresh = deliver(event, endpoint, endpoint, '') or fresh end
  end
  return fresh
end

local function progress_slot(job)
  return job.id .. ' progress'
end

-- A progress that was not delivered before the job's end is not news any more.
local function forget_progress(job, webhook)
  local receivers = redis.call('ZRANGE', P .. 'endpoints:' .. job.tenant, 0, -1)
  if webhook ~= '' then
    receivers[#receivers + 1] = string.sub(webhook, 1, 3) == 'we_' and webhook or url_receiver(job.tenant, webhook)
  end
  for _, receiver in ipairs(receivers) do
    forget_delivery(delivery_id({slot = progress_slot(job)}, receiver))
  end
end

-- The end of a job of /v1/responses is told as OpenAI tells it: of the response that the job has made, which fails
-- where a job expires. Answers id, word and more members of data.
local function as_response(job, word)
  local response = 'resp_' .. string.gsub(job.id, '^job_', '', 1)
  return response, word == 'expired' and 'failed' or word, ',"job_id":"' .. job.id .. '"'
end

-- Declared in records.lua. What has just become of a job, for whoever wants to hear of it. The last event of its log
-- gives the number. `word`: the end's state, started, progress or output; `more`: JSON members of data, or ''
tell = function(job, word, more)
  local seen = redis.call('HMGET', job.key, 'webhook', 'webhook_events', 'custom_id', 'told_ms', 'batch', 'endpoint')
  if (seen[5] or '') ~= '' then return end  -- a line of a batch, which tells for all of them
  local webhook, told = seen[1] or '', number(seen[4])
  if webhook == '' and redis.call('EXISTS', P .. 'endpoints:' .. job.tenant) == 0 then return end
  if TERMINAL[word] and told then forget_progress(job, webhook) end

  local kind, id, said = 'job', job.id, word
  if TERMINAL[word] and seen[6] == '/v1/responses' then
    kind = 'response'
    local names
    id, said, names = as_response(job, word)
    more = names .. more
  end
  if not wants(seen[2] or '', word) and not wants(seen[2] or '', said) then webhook = '' end

  local seq = whole(tonumber(job.next_seq) - 1)
  local name = (seen[3] or '') ~= '' and ',"custom_id":' .. cjson.encode(seen[3]) or ''
  local event = {tenant = job.tenant, subject = job.id, type = kind .. '.' .. said, key = seq,
    tries = HOOK_TRIES[word] or '',
    data = '{"id":"' .. id .. '","status":"' .. (kind == 'job' and job.state or said) .. '","seq":' .. seq .. name ..
      more .. '}'}
  if word == 'progress' then
    event.slot = progress_slot(job)
    event.due = math.max(NOW, (told or 0) + HOOK_PROGRESS_GAP_MS)
  end
  if send_event(event, webhook) and word == 'progress' then redis.call('HSET', job.key, 'told_ms', whole(event.due)) end
end

-- The same for an event that a worker published: most of them are nobody's news.
local function tell_of(job, event)
  if string.find(event, '"type":"job.progress"', 1, true) then
    tell(job, 'progress', ',"progress":' .. string.gsub(event, '"type":"job%.progress",', '', 1))
  elseif string.find(event, '"type":"job.output"', 1, true) then
    tell(job, 'output', ',"outputs":[' .. string.gsub(event, '"type":"job%.output",', '', 1) .. ']')
  end
end
