"""The page's own JavaScript: pictures that are dropped or pasted anywhere, downloads, names for what has none."""

HEAD = """
<script>
window.querybridge = {
  // a secret of this browser's tab, which outlives a reload and not the tab
  token() {
    let token = sessionStorage.getItem("querybridge");
    if (!token) {
      const bytes = crypto.getRandomValues(new Uint8Array(16));
      token = Array.from(bytes, byte => byte.toString(16).padStart(2, "0")).join("");
      sessionStorage.setItem("querybridge", token);
    }
    return token;
  },
  // a picture from a camera comes without the event that one that is uploaded has; it goes to the other places, too
  shared(picture, places) {
    const taken = picture?.orig_name === "image.png" && picture.path !== this.taken;
    if (taken) this.taken = picture.path;
    return Array(places).fill(taken ? picture : { __type__: "update" });
  },
  save(file) {
    if (!file) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([file.text], { type: file.type }));
    link.download = file.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  },
};
(() => {
  const seen = element => element && element.getClientRects().length > 0;
  // where a picture goes that is dropped or pasted somewhere: the box of the chat, or the picture's place of a tab
  const place = () => ["#chat-box", ".picture", "#search-like", "#batch-files"]
    .flatMap(name => [...document.querySelectorAll(name)]).find(seen);
  const put = files => {
    const input = place()?.querySelector("input[type=file]");
    if (!input || !files.length) return false;
    const given = new DataTransfer();
    for (const file of input.multiple ? files : files.slice(0, 1)) given.items.add(file);
    input.files = given.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    return true;
  };
  const pictures = data => [...(data?.files ?? [])].filter(file => file.type.startsWith("image/"));
  const ownZone = target => target.closest?.("[aria-dropeffect], #chat-box");
  addEventListener("dragover", event => event.preventDefault());
  addEventListener("drop", event => {
    event.preventDefault();  // else the browser leaves the page for the file
    if (!ownZone(event.target)) put([...(event.dataTransfer?.files ?? [])]);
  });
  addEventListener("paste", event => {
    if (!event.target.closest?.("#chat-box") && put(pictures(event.clipboardData))) event.preventDefault();
  });
  let touched = false;  // whoever scrolls is let be
  for (const kind of ["wheel", "touchmove", "pointerdown", "keydown"]) {
    addEventListener(kind, () => { touched = true; }, { passive: true });
  }
  // what the page's library leaves without a name, or names where no name may be
  const name = () => {
    for (const label of document.querySelectorAll("div.empty[aria-label]")) label.removeAttribute("aria-label");
    for (const button of document.querySelectorAll("button:not([aria-label])")) {
      if (button.innerText.trim() || button.title) continue;
      const image = button.querySelector("img");
      const file = decodeURIComponent((image?.src ?? "").split(/[/?]/).at(-1));
      const row = button.closest(".examples");
      if (row) {
        button.setAttribute("aria-label", `Picture to try ${[...row.querySelectorAll("button")].indexOf(button) + 1}`);
      } else if (image) button.setAttribute("aria-label", `Enlarge ${image.alt || file || "the picture"}`);
    }
    for (const outer of document.querySelectorAll("button:has(button):not([role=group])")) {
      outer.setAttribute("role", "group");
      outer.setAttribute("aria-label", outer.title = "Add files");
      outer.tabIndex = -1;
    }
    for (const image of document.querySelectorAll("img:not([alt])")) image.alt = "";
    // the library scrolls a chat to its end, which hides the first of the examples on a phone
    const chat = document.querySelector("#chat .bubble-wrap");
    const empty = chat?.querySelector(".placeholder, .example") && !chat.querySelector(".message");
    if (empty && !touched) chat.scrollTop = 0;
    document.querySelector("#chat-box textarea")?.setAttribute("aria-label", "Your turn");
    for (const list of document.querySelectorAll("#tabs [role=tablist]")) list.setAttribute("aria-label", "Tabs");
    for (const [id, role] of [["#answers", "status"], ["#compared", "status"], ["#caption", "status"]]) {
      const region = document.querySelector(id);
      if (region && !region.hasAttribute("aria-live")) {
        region.setAttribute("aria-live", "polite");
        if (role) region.setAttribute("role", role);
      }
    }
  };
  let due = 0;
  const later = () => { due ||= requestAnimationFrame(() => { due = 0; name(); }); };
  const watch = () => {
    new MutationObserver(later).observe(document.body, { childList: true, subtree: true });
    document.documentElement.lang ||= "en";
    later();
  };
  if (document.readyState === "loading") addEventListener("DOMContentLoaded", watch);
  else watch();
  // arrow keys go from tab to tab
  addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || event.target.getAttribute?.("role") !== "tab") return;
    const tabs = [...event.target.closest("[role=tablist]").querySelectorAll("[role=tab]")].filter(seen);
    const next = tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
    event.preventDefault();
  });
})();
</script>
"""
