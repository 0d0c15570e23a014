// The page's only script: asks the API as any client does, keeps a key in this tab alone, follows videos by events.
const $ = (id) => document.getElementById(id);
const PAGE_SIZE = 24, FOLLOWED = 2, POLL_MS = 2000;
const videos = new Map();   // id -> {video, card, follow: AbortController | null}
let key = sessionStorage.getItem("stiv-key") ?? "";
let oldest = null, language = "python", polling = null;

class Refused extends Error {
  constructor(status, error) { super(error.message); this.status = status; this.param = error.param; }
}

async function ask(path, options = {}) {
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...options.headers };
  let answer;
  try { answer = await fetch(path, { ...options, headers }); } catch (error) {
    if (error.name === "AbortError") throw error;
    say("away", "The server does not answer");
    throw new Refused(0, { message: "The server does not answer. Is it running?" });
  }
  if (answer.ok) return answer;
  let error = { message: `The server answered ${answer.status}` };
  try { error = (await answer.json()).error; } catch { /* no envelope */ }
  if (answer.status === 401) askForKey(key ? error.message : "");
  throw new Refused(answer.status, error);
}

const askJson = async (path, options) => (await ask(path, options)).json();

function say(state, text) { $("server").className = state; $("server-text").textContent = text; }
function announce(text) { $("news").textContent = text; }

// ---- key -------------------------------------------------------------------------------------------------------
function askForKey(problem) {
  $("key-open").hidden = false;
  $("key-problem").hidden = !problem;
  $("key-problem").textContent = problem;
  if (!$("key-dialog").open) $("key-dialog").showModal();
}
$("key-open").addEventListener("click", () => askForKey(""));
$("key-form").addEventListener("submit", () => {
  key = $("key").value.trim();
  sessionStorage.setItem("stiv-key", key);
  $("key").value = "";
  start();
});

// ---- form ------------------------------------------------------------------------------------------------------
function fields() {
  const values = {};
  for (const input of $("create").elements)
    if (input.name && input.type !== "file" && input.value.trim()) values[input.name] = input.value.trim();
  return values;
}

function showProblem(error) {
  for (const input of $("create").elements) input.removeAttribute("aria-invalid");
  $("problem").hidden = !error;
  $("problem").textContent = error ? error.message : "";
  const wrong = error?.param && $("create").elements.namedItem(error.param);
  if (wrong) {
    wrong.setAttribute("aria-invalid", "true");
    wrong.closest("details")?.setAttribute("open", "");
    wrong.focus();
  }
}

$("create").addEventListener("submit", async (event) => {
  event.preventDefault();
  showProblem(null);
  if (!$("prompt").value.trim()) return showProblem({ message: "Say what the video shows.", param: "prompt" });
  const body = new FormData();
  for (const [name, value] of Object.entries(fields())) body.append(name, value);
  if ($("image").files[0]) body.append("input_reference", $("image").files[0]);
  $("submit").disabled = true;
  try {
    const video = await askJson("/v1/videos", {
      method: "POST", body, headers: { "idempotency-key": crypto.getRandomValues(new Uint32Array(4)).join("-") },
    });
    show(video, true);
    announce("The video is queued.");
    keepWatching();
  } catch (error) { showProblem(error); } finally { $("submit").disabled = false; }
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("create").requestSubmit();
});

function showImage() {
  const file = $("image").files[0];
  URL.revokeObjectURL($("image-shown").src);
  $("image-shown").hidden = $("image-remove").hidden = !file;
  if (file) $("image-shown").src = URL.createObjectURL(file);
  writeCode();
}
$("image").addEventListener("change", showImage);
$("image-remove").addEventListener("click", () => { $("image").value = ""; showImage(); $("image").focus(); });
for (const kind of ["dragover", "dragleave", "drop"]) $("drop").addEventListener(kind, (event) => {
  event.preventDefault();
  $("drop").classList.toggle("over", kind === "dragover");
  if (kind === "drop" && event.dataTransfer.files.length) { $("image").files = event.dataTransfer.files; showImage(); }
});

// ---- client code -----------------------------------------------------------------------------------------------
const OPENAI = ["prompt", "model", "seconds", "size"];
const python = (text) => JSON.stringify(text);
const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function pythonCode(values, image) {
  const extra = Object.entries(values).filter(([name]) => !OPENAI.includes(name));
  const lines = Object.entries(values).filter(([name]) => OPENAI.includes(name))
    .map(([name, value]) => `    ${name}=${python(value)},`);
  if (image) lines.push(`    input_reference=open(${python(image.name)}, "rb"),`);
  if (extra.length) lines.push(`    extra_body={${extra.map(([name, value]) => `${python(name)}: ${python(value)}`).join(", ")}},`);
  return `from openai import OpenAI\n\nclient = OpenAI(base_url=${python(`${location.origin}/v1`)}, api_key="${
    $("key-open").hidden ? "any" : "YOUR_KEY"}")\nvideo = client.videos.create_and_poll(\n${lines.join("\n")}\n)\n`
    + `client.videos.download_content(video.id).write_to_file("video.mp4")\n`;
}

function curlCode(values, image) {
  const parts = Object.entries(values).map(([name, value]) => `  --form-string ${shell(`${name}=${value}`)}`);
  if (image) parts.push(`  -F ${shell(`input_reference=@${image.name}`)}`);
  const auth = $("key-open").hidden ? "" : " \\\n  -H 'authorization: Bearer YOUR_KEY'";
  return `curl ${location.origin}/v1/videos${auth} \\\n${parts.join(" \\\n")}\n\n# then, with its id\ncurl ${
    location.origin}/v1/videos/ID${auth}\ncurl ${location.origin}/v1/videos/ID/content${auth} -o video.mp4\n`;
}

function writeCode() {
  const values = { prompt: $("prompt").placeholder, ...fields() };
  $("snippet").textContent = (language === "python" ? pythonCode : curlCode)(values, $("image").files[0]);
}

function choose(tab) {
  language = tab.id.replace("tab-", "");
  for (const each of [$("tab-python"), $("tab-curl")]) {
    each.setAttribute("aria-selected", String(each === tab));
    each.tabIndex = each === tab ? 0 : -1;
  }
  $("snippet").setAttribute("aria-labelledby", tab.id);
  writeCode();
}
for (const tab of [$("tab-python"), $("tab-curl")]) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const other = tab.id === "tab-python" ? $("tab-curl") : $("tab-python");
    choose(other);
    other.focus();
  });
}
$("create").addEventListener("input", writeCode);
$("copy").addEventListener("click", async () => {
  try { await navigator.clipboard.writeText($("snippet").textContent); } catch {
    getSelection().selectAllChildren($("snippet"));
    return announce("The code is selected; copy it with Ctrl+C.");
  }
  $("copy").textContent = "Copied";
  announce("The code is copied.");
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
});

// ---- gallery ---------------------------------------------------------------------------------------------------
const isActive = (video) => video.status === "queued" || video.status === "in_progress";

function show(video, first) {
  let entry = videos.get(video.id);
  if (!entry) {
    const card = $("card").content.firstElementChild.cloneNode(true);
    entry = { video, card, follow: null };
    videos.set(video.id, entry);
    $("gallery")[first ? "prepend" : "append"](card);
    card.querySelector(".remove").addEventListener("click", () => remove(video.id));
    card.querySelector(".again").addEventListener("click", () => useAgain(video.id));
  }
  const before = entry.video;
  entry.video = video;
  paint(entry, before === video || before.status !== video.status);
  $("empty").hidden = videos.size > 0;
}

function paint({ video, card }, statusChanged) {
  const part = (name) => card.querySelector(name);
  const words = { queued: "Waiting", in_progress: `${video.progress} %`, completed: "", failed: "Failed" }[video.status];
  card.classList.toggle("working", isActive(video));
  part(".prompt").textContent = video.prompt;
  part(".facts").textContent = [words, video.size, `${video.seconds} s`].filter(Boolean).join(" · ");
  part("progress").hidden = !isActive(video);
  part("progress").value = video.progress;
  part("progress").setAttribute("aria-label", `Progress of: ${video.prompt}`);
  part(".failure").hidden = video.status !== "failed";
  part(".failure").textContent = video.error?.message ?? "";
  part(".again").hidden = part(".download").hidden = video.status !== "completed";
  part(".remove").textContent = isActive(video) ? "Cancel" : "Delete";
  part(".remove").setAttribute("aria-label", `${isActive(video) ? "Cancel" : "Delete"}: ${video.prompt}`);
  if (statusChanged && video.status === "completed") showContent(video, card);
}

async function content(video, variant) {
  const path = `/v1/videos/${video.id}/content?variant=${variant}`;
  if (!key) return path;
  return URL.createObjectURL(await (await ask(path)).blob());  // a player cannot send the key
}

async function showContent(video, card) {
  try {
    const [player, picture, link] = ["video", "img", ".download"].map((name) => card.querySelector(name));
    player.poster = await content(video, "thumbnail");
    player.src = link.href = await content(video, "video");
    player.setAttribute("aria-label", video.prompt);
    link.download = `${video.id}.mp4`;
    player.hidden = false;
    picture.hidden = true;
  } catch (error) {
    card.querySelector(".failure").hidden = false;
    card.querySelector(".failure").textContent = error.message;
  }
}

async function remove(id) {
  const { video, card, follow } = videos.get(id);
  try { await ask(`/v1/videos/${id}`, { method: "DELETE" }); } catch (error) {
    if (error.status !== 404) return announce(error.message);
  }
  const held = card.contains(document.activeElement);  // who has gone on to another place stays there
  follow?.abort();
  forget(id);
  announce(isActive(video) ? "The video is cancelled." : "The video is deleted.");
  if (held) $("gallery-title").focus();
}

function forget(id) {
  videos.get(id)?.card.remove();
  videos.delete(id);
  $("empty").hidden = videos.size > 0;
}

function useAgain(id) {
  const { video } = videos.get(id);
  $("prompt").value = video.prompt;
  $("size").value = video.size;
  writeCode();
  $("prompt").focus();
}

// ---- watching --------------------------------------------------------------------------------------------------
async function follow(entry) {
  entry.follow = new AbortController();
  try {
    const answer = await ask(`/v1/videos/${entry.video.id}/events`, { signal: entry.follow.signal });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", part; !(part = await reader.read()).done;) {
      const events = (rest + part.value).split("\n\n");
      rest = events.pop();
      for (const event of events) hear(entry, event);
    }
  } catch (error) { if (error.name === "AbortError") return; } finally { entry.follow = null; }
}

function hear(entry, event) {
  const name = /^event: (.*)$/m.exec(event)?.[1], data = /^data: (.*)$/m.exec(event)?.[1];
  if (!name || !data) return;
  const said = JSON.parse(data);
  if (name === "video.preview") {
    const picture = entry.card.querySelector("img");
    picture.src = said.image;
    picture.alt = `Preview of: ${entry.video.prompt}`;
    picture.hidden = false;
  } else if (name === "video.deleted") forget(said.id);
  else hearVideo(said);
}

function hearVideo(video) {
  const before = videos.get(video.id)?.video;
  show(video, true);
  if (before && isActive(before) && !isActive(video))
    announce(video.status === "completed" ? "A video is ready." : `A video failed: ${video.error?.message}`);
}

async function watch() {
  const active = () => [...videos.values()].filter(({ video }) => isActive(video));
  while (active().length) {
    const unfollowed = active().filter((entry) => !entry.follow).reverse();
    const free = FOLLOWED - (active().length - unfollowed.length);
    for (const entry of unfollowed.slice(0, Math.max(0, free))) follow(entry);
    await new Promise((done) => setTimeout(done, POLL_MS));
    try {
      for (const { video, follow: stream } of active())
        if (!stream) hearVideo(await askJson(`/v1/videos/${video.id}`));
    } catch (error) { if (error.status !== 404) await checkServer(); else await load(); }
  }
}
function keepWatching() { polling ??= watch().finally(() => { polling = null; }); }

async function load() {
  const page = await askJson(`/v1/videos?limit=${PAGE_SIZE}`);
  for (const id of [...videos.keys()]) if (!page.data.some((video) => video.id === id)) forget(id);
  for (const video of page.data) show(video, false);
  oldest = page.last_id;
  $("more").hidden = !page.has_more;
}
$("more").addEventListener("click", async () => {
  const page = await askJson(`/v1/videos?limit=${PAGE_SIZE}&after=${oldest}`);
  for (const video of page.data) show(video, false);
  oldest = page.last_id ?? oldest;
  $("more").hidden = !page.has_more;
});

async function checkServer() {
  const models = await askJson("/v1/models");
  const ready = (await fetch("/ready").catch(() => null))?.ok;
  say(ready ? "ready" : "away", `${models.data[0].id} · ${ready ? "ready" : "not ready yet"}`);
}

async function start() {
  writeCode();
  try {
    await checkServer();
    await load();
    keepWatching();
  } catch { /* said already: no key, or no server */ }
}
start();
