//! What the system says of RDMA devices: of which kind they are, and why one cannot be opened, in words that say what to do.

use std::io;
use std::path::Path;

/// What is told of a device that could not be opened for that error.
pub(crate) fn cannot_open(device: &str, error: &io::Error) -> String {
    let hint = match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => {
            ": this user may not open /dev/infiniband/uverbs*; add it to the group that owns them (often `rdma`)"
        }
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            ": is /dev/infiniband in this container (--device=/dev/infiniband), and ib_uverbs loaded?"
        }
        _ => "",
    };
    format!("{device} cannot be opened: {error}{hint}")
}

/// What is told of the devices below that root whose nodes cannot be opened. For libraries that pass over such devices
/// without a word.
pub(crate) fn shut_devices(root: &Path, open: impl Fn(&Path) -> io::Result<()>) -> Vec<String> {
    let nodes = std::fs::read_dir(root.join("sys/class/infiniband_verbs")).into_iter().flatten().flatten();
    let shut = nodes.filter_map(|node| {
        let device = std::fs::read_to_string(node.path().join("ibdev")).ok()?;
        let error = open(&root.join("dev/infiniband").join(node.file_name())).err()?;
        Some(cannot_open(device.trim(), &error))
    });
    let mut told: Vec<_> = shut.collect();
    told.sort_unstable();
    told
}

/// Opens a node as the libraries do, and closes it.
pub(crate) fn open_node(node: &Path) -> io::Result<()> {
    std::fs::OpenOptions::new().read(true).write(true).open(node).map(drop)
}

/// Of which kind a device is, as the kernel numbers them; `class` is sysfs's folder of RDMA devices. `None` where that
/// says nothing.
pub(crate) fn kind_of(class: &Path, device: &str) -> Option<u32> {
    let kind = std::fs::read_to_string(class.join(device).join("node_type")).ok()?;
    kind.split(':').next()?.trim().parse().ok()
}

/// An adapter for InfiniBand or RoCE.
pub(crate) const CHANNEL_ADAPTER: u32 = 1;
/// One for iWARP.
pub(crate) const IWARP_ADAPTER: u32 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_whose_nodes_cannot_be_opened_are_told() {
        let root = std::env::temp_dir().join(format!("anyfabric-nodes-{}", std::process::id()));
        let write = |name: &str, text: &str| {
            let file = root.join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        };
        assert!(shut_devices(&root, open_node).is_empty());
        write("sys/class/infiniband_verbs/abi_version", "6\n");
        for (number, device) in ["rdmap16s27", "rdmap32s27"].iter().enumerate() {
            write(&format!("sys/class/infiniband_verbs/uverbs{number}/ibdev"), &format!("{device}\n"));
        }
        write("dev/infiniband/uverbs0", "");
        let told = shut_devices(&root, open_node);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].starts_with("rdmap32s27 cannot be opened: No such file"), "{told:?}");
        assert!(told[0].contains("--device=/dev/infiniband"), "{told:?}");
        let told = shut_devices(&root, |_| Err(io::Error::from_raw_os_error(libc::EACCES)));
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].starts_with("rdmap16s27 cannot be opened: Permission denied"), "{told:?}");
        assert!(told[0].contains("the group that owns them"), "{told:?}");
        std::fs::remove_dir_all(root).unwrap();
    }
}
