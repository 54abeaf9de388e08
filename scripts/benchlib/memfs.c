/* memfs MOUNTPOINT SIZE direct|cached: a read-only FUSE file system with one file, "file", of SIZE bytes in memory.
 * What FUSE itself can do on this machine: every read is one reply from memory, and nothing else. */
#define FUSE_USE_VERSION 34
#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char *content;
static size_t size;
static int direct;

static int fill_stat(fuse_ino_t ino, struct stat *st)
{
    memset(st, 0, sizeof *st);
    st->st_ino = ino;
    st->st_uid = getuid();
    st->st_gid = getgid();
    if (ino == FUSE_ROOT_ID) {
        st->st_mode = S_IFDIR | 0755;
        st->st_nlink = 2;
        return 0;
    }
    if (ino != 2)
        return -1;
    st->st_mode = S_IFREG | 0444;
    st->st_nlink = 1;
    st->st_size = (off_t)size;
    st->st_blksize = 1 << 20;
    return 0;
}

static void on_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct fuse_entry_param entry = {.ino = 2, .attr_timeout = 3600, .entry_timeout = 3600};
    if (parent != FUSE_ROOT_ID || strcmp(name, "file") != 0) {
        fuse_reply_err(req, ENOENT);
        return;
    }
    fill_stat(2, &entry.attr);
    fuse_reply_entry(req, &entry);
}

static void on_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    struct stat st;
    (void)fi;
    if (fill_stat(ino, &st) == 0)
        fuse_reply_attr(req, &st, 3600);
    else
        fuse_reply_err(req, ENOENT);
}

static void on_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    if (ino != 2 || (fi->flags & O_ACCMODE) != O_RDONLY) {
        fuse_reply_err(req, EACCES);
        return;
    }
    fi->direct_io = direct ? 1 : 0;
    fi->keep_cache = direct ? 0 : 1;
    fuse_reply_open(req, fi);
}

static void on_read(fuse_req_t req, fuse_ino_t ino, size_t length, off_t offset, struct fuse_file_info *fi)
{
    (void)ino;
    (void)fi;
    if ((size_t)offset >= size)
        length = 0;
    else if (length > size - (size_t)offset)
        length = size - (size_t)offset;
    fuse_reply_buf(req, content + offset, length);
}

static const struct fuse_lowlevel_ops operations = {
    .lookup = on_lookup, .getattr = on_getattr, .open = on_open, .read = on_read};

int main(int argc, char **argv)
{
    char *fuse_argv[] = {argv[0], "-o", "fsname=memfs,subtype=memfs,default_permissions", NULL};
    struct fuse_args args = FUSE_ARGS_INIT(3, fuse_argv);
    struct fuse_session *session;
    int status = 1;
    if (argc != 4) {
        fprintf(stderr, "usage: memfs MOUNTPOINT SIZE direct|cached\n");
        return 2;
    }
    size = strtoull(argv[2], NULL, 10);
    direct = strcmp(argv[3], "direct") == 0;
    content = malloc(size);
    if (content == NULL)
        return 1;
    memset(content, 0x5a, size); /* touched once, so that no reply pays for fresh pages */
    session = fuse_session_new(&args, &operations, sizeof operations, NULL);
    if (session == NULL)
        return 1;
    if (fuse_set_signal_handlers(session) == 0 && fuse_session_mount(session, argv[1]) == 0) {
        struct fuse_loop_config config = {.clone_fd = 0, .max_idle_threads = 10};
        status = fuse_session_loop_mt(session, &config) != 0;
        fuse_session_unmount(session);
    }
    fuse_session_destroy(session);
    return status;
}
