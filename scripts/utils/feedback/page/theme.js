// Runs before the page is drawn, so that a chosen theme does not flash the other one first.
(() => {
  try {
    const theme = localStorage.getItem("theme");
    if (theme) document.documentElement.dataset.theme = theme;
  } catch {
    /* storage is switched off: the system's theme */
  }
})();
