-- Ask that a batch stop; its runner ends it. Repeated, it answers the same. ARGV: id, tenant ('' = any)
-- Answers nil | its status now: of cancelling and cancelled it is true that it was asked to stop, of others it is not
local batch = load_batch(ARGV[1], ARGV[2])
if not batch then return false end
if batch.status == 'validating' or batch.status == 'in_progress' then set_status(batch, 'cancelling') end
return batch.status
