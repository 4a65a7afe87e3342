-- wrk's side of a load. Requests are formatted before the clock starts: formatting each would make wrk the limit.
--   BODIES  file of bodies, one a line; \1 in it stands for a count that no other request of this machine's had
--   ORDER   file of line numbers, the order to ask in; without it, the lines in turn
--   HEADER  one more header, "name: value"
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local name, value = (os.getenv("HEADER") or ""):match("^([^:]+): (.+)$")
if name then wrk.headers[name] = value end

local heads, tails, order, i, base, fmt = {}, {}, {}, 0, 0, string.format
local pad = ("\1"):rep(25) -- as long as a count, for Content-Length

local thread
setup = function(t) thread = t end

init = function()
  for body in io.lines(os.getenv("BODIES")) do
    local whole = wrk.format(nil, nil, nil, (body:gsub("\1", pad)))
    local from, to = whole:find(pad, 1, true)
    heads[#heads + 1] = from and whole:sub(1, from - 1) or whole
    tails[#tails + 1] = from and whole:sub(to + 1) or false
  end
  local random = io.open("/dev/urandom", "rb")
  local a, b, c = random:read(3):byte(1, 3)
  random:close()
  base = (a * 65536 + b * 256 + c) % 1000000
  if os.getenv("ORDER") then
    for line in io.lines(os.getenv("ORDER")) do order[#order + 1] = tonumber(line) end
    i = base % #order
  end
  started = os.clock() -- what was read and formatted until here is not part of the load
end

request = function()
  i = i + 1
  local k = #order > 0 and order[i % #order + 1] or i % #heads + 1
  local tail = tails[k]
  if not tail then return heads[k] end
  -- Three numbers, each exact in float32, as JSON numbers and as part of a string alike.
  return heads[k] .. fmt("1%06d, 1%06d, 1%06d", i % 1000000, math.floor(i / 1000000), base) .. tail
end

done = function(summary, latency)
  local e = summary.errors
  io.write(fmt("RESULT %d %d %.3f %.0f %.0f %d %d\n", summary.requests, summary.duration,
    os.clock() - thread:get("started"), latency:percentile(50), latency:percentile(99),
    e.status, e.read + e.write + e.connect + e.timeout))
end
