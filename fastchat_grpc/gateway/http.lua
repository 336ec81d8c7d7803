-- What the gateway's Envoy does with HTTP requests and answers that no filter of its own does.
-- Requests: content types and encodings, HEAD, headers that are too large for the services behind.
-- Answers: every error in OpenAI's shape, Retry-After, no body for HEAD.
--
-- In front of this file stand the tables TYPES, CODES, PARAMS and MESSAGES of the services' own errors, and VERSION,
-- WATCHED, KEY_FIRST, LOOPBACK and ORIGINS. The services' statuses come as the transcoder's JSON of google.rpc.Status, whose
-- members have a fixed order.

local SPACE = "fastchat_grpc"
local PICKS = "envoy.filters.http.ext_authz"
-- What Envoy says itself that helps nobody; and statuses whose own words never do.
local VAGUE = {[""] = true, ["upstream request timeout"] = true, ["stream timeout"] = true,
  ["no healthy upstream"] = true, ["Bad Request"] = true, ["Not Implemented"] = true}
local OURS = {[408] = true, [413] = true}
-- The services refuse more than 16 KiB of headers, each counted with 32 bytes more, and some come on top of these.
local MAX_HEADERS = 14000
local OVERHEAD = 32
-- Envoy takes 100 of them, and fails a request that the gateway's own headers bring above that.
local MAX_COUNT = 80
-- What stays of headers that are too many or too large: what the services behind read, and what says how the body is to be read.
local NEEDED = {["authorization"] = true, ["x-api-key"] = true, ["api-key"] = true, ["x-request-id"] = true,
  ["content-type"] = true, ["content-length"] = true, ["content-encoding"] = true, ["transfer-encoding"] = true, ["te"] = true,
  ["accept"] = true, ["accept-encoding"] = true, ["user-agent"] = true, ["host"] = true, ["traceparent"] = true,
  ["tracestate"] = true, ["x-forwarded-proto"] = true, ["x-forwarded-for"] = true, ["x-envoy-external-address"] = true}
-- The key of a request with a larger body than this is asked for before the body is taken.
local LARGE_BODY = 65536

-- Only the first line: the transcoder shows the place of a mistake in further ones.
local function escape(text)
  text = text:match("[^\r\n]*"):gsub("[\127-\255]", "?")
  return (text:gsub('[%z\1-\31\\"]', function(c) return string.format("\\u%04x", c:byte()) end))
end

local function quoted(text)
  if text == nil or text == "" then return "null" end
  return '"' .. text .. '"'
end

-- The JSON string, still escaped, that begins where the marker ends.
local function string_after(text, marker)
  local _, last = text:find(marker, 1, true)
  local at = last and last + 1
  while at do
    local found = text:find('[\\"]', at)
    if found == nil then return nil end
    if text:sub(found, found) == '"' then return text:sub(last + 1, found - 1) end
    at = found + 2  -- an escape: the character after the backslash is no end
  end
end

-- `message` and `field` are JSON text already.
local function error_json(status, message, field, code)
  return '{"error":{"message":"' .. message .. '","type":"' .. (TYPES[status] or "server_error")
    .. '","param":' .. quoted(field) .. ',"code":' .. quoted(code) .. '}}'
end

local ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

local function base64_decode(text)
  local bytes, bits, count = {}, 0, 0
  for character in text:gmatch("[%w+/]") do
    bits = bits * 64 + ALPHABET:find(character, 1, true) - 1
    count = count + 6
    if count >= 8 then
      count = count - 8
      local byte = math.floor(bits / 2 ^ count)
      bytes[#bytes + 1] = string.char(byte)
      bits = bits - byte * 2 ^ count
    end
  end
  return table.concat(bytes)
end

------------------------------------------------------------------------------------------------- requests

local function refuse(handle, status, message, field)
  handle:respond({[":status"] = tostring(status), ["content-type"] = "application/json"},
    error_json(status, message, field, nil))
end

local function fits(headers)
  local total, count = 0, 0
  for name, value in pairs(headers) do
    total = total + #name + #value + OVERHEAD
    count = count + 1
  end
  return total <= MAX_HEADERS and count <= MAX_COUNT
end

-- Whether the headers are, or could be made, few and small enough for the services behind.
local function slim(headers, is_grpc)
  headers:remove("cookie")  -- no service reads them
  if fits(headers) then return true end
  if is_grpc then return false end
  local surplus = {}
  for name, _ in pairs(headers) do
    if name:sub(1, 1) ~= ":" and not NEEDED[name] then surplus[#surplus + 1] = name end
  end
  for _, name in ipairs(surplus) do headers:remove(name) end
  return fits(headers)
end

-- The services behind take printable ASCII alone: gRPC logs, in full and as an error, a header that has more.
local function sanitize(headers)
  local found = {}
  for name, value in pairs(headers) do
    if value:find("[\128-\255]") then found[name] = value:gsub("[\128-\255]", "?") end
  end
  for name, value in pairs(found) do headers:replace(name, value) end
end

-- Whether a page was loaded under a name that leads to this machine now, without being allowed here: DNS can be
-- turned while a page is open, and for its browser the gateway is where it came from, so it asks no leave.
local function is_rebound(headers)
  local origin, host = headers:get("origin"), headers:get(":authority")
  if not LOOPBACK or origin == nil or origin:match("^%a+://(.*)$") ~= host then return false end
  local name = host:gsub(":%d+$", "")
  if name:match("^[%d.]+$") or name:match("^%[[%x:.]+%]$") or name == "localhost" or name:match("%.localhost$") then
    return false  -- nobody's DNS says where these lead
  end
  for _, pattern in ipairs(ORIGINS) do
    if origin:match(pattern) then return false end
  end
  return true
end

-- A page of any origin may send a form or plain text without asking first, but never JSON.
local function is_json(content_type)
  local kind = content_type:match("^%s*([^;%s]*)"):lower()
  return kind == "application/json" or kind == "text/json" or kind:match("^application/[%w.-]+%+json$") ~= nil
end

local function check_body(handle, headers, metadata)
  local length = tonumber(headers:get("content-length") or "")
  if length == 0 then return end
  if not is_json(headers:get("content-type") or "") then
    return refuse(handle, 415, MESSAGES[415], "content-type")
  end
  local encoding = (headers:get("content-encoding") or ""):lower()
  if encoding == "" then encoding = "identity" end
  if encoding ~= "identity" and encoding ~= "gzip" and encoding ~= "x-gzip" then
    return refuse(handle, 415, "content-encoding: must be gzip or left out", "content-encoding")
  end
  if encoding == "identity" then
    headers:remove("content-encoding")
  else
    headers:replace("content-encoding", "gzip")
    metadata:set(SPACE, "gzip", true)
  end
  if encoding ~= "identity" or length == nil or length > LARGE_BODY then metadata:set(SPACE, "large", true) end
end

-- What is answered here, for probes and people that look whether anybody is there.
local PROBES = {["/"] = '{"name":"fastchat_grpc","version":"' .. VERSION .. '","api":"/v1"}',
  ["/version"] = '{"version":"' .. VERSION .. '"}',
  ["/live"] = '{"status":"ok"}', ["/livez"] = '{"status":"ok"}'}

local function answer_probe(handle, path, is_head)
  local body = PROBES[path:match("^[^?]*")]
  if body == nil then return end
  local headers = {[":status"] = "200", ["content-type"] = "application/json", ["content-length"] = tostring(#body)}
  handle:respond(headers, is_head and "" or body)
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local metadata = handle:streamInfo():dynamicMetadata()
  local content_type = headers:get("content-type") or ""
  local is_grpc = content_type:sub(1, 16) == "application/grpc"
  if is_grpc then metadata:set(SPACE, "grpc", true) end
  sanitize(headers)
  if is_rebound(headers) then
    return refuse(handle, 403, MESSAGES.rebound, "origin")
  end
  if not slim(headers, is_grpc) then
    if is_grpc then return handle:respond({[":status"] = "431"}, MESSAGES[431]) end
    return refuse(handle, 431, MESSAGES[431], nil)
  end
  if is_grpc then
    if KEY_FIRST[headers:get(":path"):match("^[^?]*")] then metadata:set(SPACE, "large", true) end
    return
  end
  local method, path = headers:get(":method"), headers:get(":path")
  if method == "HEAD" then
    -- Answered as GET is, without the body.
    metadata:set(SPACE, "head", true)
    if WATCHED and path:match("^[^?]*") == "/v1/workers:watch" then  -- whose answer does not end
      return handle:respond({[":status"] = "200", ["content-type"] = "text/event-stream"}, "")
    end
    headers:replace(":method", "GET")
    method = "GET"
  end
  if method == "GET" then
    answer_probe(handle, path, metadata:get(SPACE) and metadata:get(SPACE)["head"])
  elseif method ~= "OPTIONS" and method ~= "DELETE" then
    check_body(handle, headers, metadata)
  end
end

------------------------------------------------------------------------------------------------- answers

-- A worker that the picker chose serves other models now, or another server has taken its address: that is
-- no news of the model, which the fleet has.
local function misled(reason, picked)
  return picked and reason == "MODEL_NOT_FOUND"
end

-- Envoy calls UNKNOWN what it refuses for its size; gRPC calls that RESOURCE_EXHAUSTED.
local TOO_LARGE = {["Payload Too Large"] = MESSAGES[413], [MESSAGES[431]] = MESSAGES[431]}

local function answer_grpc(headers, picked)
  local status = headers:get("grpc-status")
  local too_large = status == "2" and TOO_LARGE[headers:get("grpc-message") or ""]
  if too_large then
    headers:replace("grpc-status", "8")
    headers:replace("grpc-message", too_large)
  end
  if status ~= "5" then return end
  local details = base64_decode(headers:get("grpc-status-details-bin") or "")
  if not misled(details:match("MODEL_NOT_FOUND"), picked) then return end
  headers:replace("grpc-status", "14")
  headers:replace("grpc-message", MESSAGES.misled)
  headers:remove("grpc-status-details-bin")
end

-- Status, and message, parameter and code as JSON text, of what a service or Envoy said.
local function read_error(status, text, picked)
  local message = text:match('^{"code":%d+,"message":"(.*)","details":%[')  -- JSON-escaped already
  if message == nil then message = text:match('^{"code":%d+,"message":"(.*)"}$') end
  local reason, field = nil, nil
  if message ~= nil then
    reason = text:match('"reason":"([%u%d_]+)"')
    field = string_after(text, '"field":"')
  elseif not VAGUE[text] and not text:find("^upstream connect error") and not text:find("^Could not resolve ") then
    message = escape(text:sub(1, 300))
  end
  if misled(reason, picked) then return 503, MESSAGES.misled, nil, "no_live_worker" end
  if status == 429 and reason == nil and message and message:find("larger than max", 1, true) then
    status = 413  -- not load but size, which gRPC gives the same code; a second try would end alike
  end
  if status == 501 then status = 400 end  -- which clients do not send again
  if OURS[status] then message = MESSAGES[status] end
  if status == 413 then field = "body" end
  if message == nil or message == "" then message = MESSAGES[status] or ("HTTP status " .. status) end
  if field == nil and reason then field = PARAMS[reason] end
  return status, message, field, reason and (CODES[reason] or reason:lower()) or nil
end

-- Seconds after which to try again: what the service says, or one.
local function pause(text)
  local delay = tonumber(text:match('"retry_?[dD]elay":"([%d.]+)s"') or "")
  return string.format("%d", math.max(1, math.ceil(delay or 1)))
end

function envoy_on_response(handle)
  local headers = handle:headers()
  local metadata = handle:streamInfo():dynamicMetadata()
  local ours, picks = metadata:get(SPACE) or {}, metadata:get(PICKS) or {}
  if ours["grpc"] then return answer_grpc(headers, picks["places"]) end
  headers:remove("grpc-status")
  headers:remove("grpc-message")
  headers:remove("grpc-status-details-bin")
  local status = tonumber(headers:get(":status") or "")
  local failed = status ~= nil and status >= 400
  if not failed and not ours["head"] then return end
  local body = handle:body(failed and not ours["head"])
  -- Asked for anew: what was got before the body was waited for may not be used after.
  headers = handle:headers()
  local text = ""
  if body and body:length() > 0 then text = body:getBytes(0, body:length()) end
  local length = #text > 0 and #text or tonumber(headers:get("content-length") or "")
  if failed and text:sub(1, 9) ~= '{"error":' then
    local message, field, code
    local told = status
    status, message, field, code = read_error(status, text, picks["places"])
    -- Envoy passes on what it could unpack, and says nothing of the rest.
    if ours["gzip"] and status == 400 and (field == nil or field == "body") then message = message .. MESSAGES.gzip end
    if status ~= told then headers:replace(":status", tostring(status)) end
    local answer = error_json(status, message, field, code)
    if body and not ours["head"] then headers:replace("content-length", tostring(body:setBytes(answer))) end
    length = #answer
    headers:replace("content-type", "application/json")
  end
  if (status == 429 or status == 503) and headers:get("retry-after") == nil then
    headers:replace("retry-after", pause(text))
  end
  if ours["head"] then
    if body and body:length() > 0 then body:setBytes("") end
    if length then headers:replace("content-length", tostring(length)) end  -- of what GET would bring
  end
end
