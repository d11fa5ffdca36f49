-- Give one message back to the broker now. Writes runs, run_due, run_leases and the broker's list.
-- ARGV: task id, 1 = only if it waits for its ETA
-- Answers 1 | 0 if none was kept
if ARGV[2] == '1' and not redis.call('ZSCORE', P .. 'run_due', ARGV[1]) then return 0 end
return give_back(ARGV[1]) and 1 or 0
