// Browsers start no worker for a page that was opened from a folder. There the search runs in a hidden frame instead,
// which looks like a worker to both sides. Its name ends the theme's own search for such a script on the network.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = inside.document.createElement("script")
      const loaded = new Promise(resolve => script.addEventListener("load", resolve))
      script.src = url
      inside.document.body.append(script)
      this.postMessage = data => loaded.then(() => inside.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
}
