addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });

const every = Number(document.body.dataset.live || 0);
if (every) {
  const renew = async () => {
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      if (answer.ok) {
        const page = new DOMParser().parseFromString(await answer.text(), "text/html"), fresh = page.querySelector("main");
        document.title = page.title;
        const open = [...document.querySelectorAll("details")].map((d) => d.open);
        document.querySelector("main").replaceWith(fresh);
        document.querySelectorAll("details").forEach((d, i) => { if (i < open.length) d.open = open[i]; });
      }
    } catch {
      const pulse = document.getElementById("pulse");
      if (pulse) pulse.textContent = "the run has ended; its page is report.html in its folder";
    }
    setTimeout(renew, every * 1000);
  };
  setTimeout(renew, every * 1000);
}
